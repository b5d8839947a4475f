"""Prompt lists: plain text, JSON lines, or given in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visiontune.data.captions import read_text
from visiontune.errors import UserError
from visiontune.outside import parse_json, shown

SUFFIXES = (".txt", ".jsonl")
# Endings of files that people keep prompts in and that are not read; a prompt of one word hardly ends so.
_OTHERS = (".csv", ".tsv", ".json", ".yaml", ".yml", ".parquet", ".md", ".text", ".xlsx")


def is_list(text: str) -> bool:
    """Whether a text is the name of a prompt list: it ends in ``.txt`` or ``.jsonl``, in either case."""
    return text.lower().endswith(SUFFIXES) and "\n" not in text


def read_prompts(source: str | Sequence[str]) -> list[str]:
    """Prompts from a ``.txt`` file (one a line), a ``.jsonl`` file, one prompt, or a list of prompts.

    A text is a file's name where it ends in ``.txt`` or ``.jsonl``. Any other text is a prompt, as it stands, but for
    names of other files: one without a space that ends like one, or that lies there. A line of a ``.jsonl`` file is a
    text or an object with the key ``prompt`` or ``text``; only there may a prompt be empty, for an unconditional image.

    Raises:
        UserError: the file is missing, empty, not UTF-8, of another kind, or has an empty or malformed line.
    """
    if not isinstance(source, str):
        prompts = list(source)
        if not prompts:
            raise UserError("the list of prompts is empty: give at least one")
        return prompts
    if is_list(source):
        return _of_file(source)
    if _other_file(source):
        there = Path(source).is_file()
        what = (
            f"prompts file {shown(source)} must end" if there else f"there is no prompts file {shown(source)}; they end"
        )
        raise UserError(f"{what} in .txt or .jsonl (as a prompt it is written in a list: ['{shown(source)}'])")
    return read_prompts([source] if source.strip() else [])


def _of_file(name: str) -> list[str]:
    # Not splitlines: that would also break a prompt at a form feed or a Unicode line separator.
    text = read_text(name, "prompts file").replace("\r\n", "\n").replace("\r", "\n").rstrip()
    if not text:
        raise UserError(f"prompts file {name} is empty: write one prompt a line")
    lines = text.split("\n")
    empty = [str(i) for i, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise UserError(
            f"prompts file {name} has empty lines ({', '.join(empty[:10])}): remove them"
            ' (an empty prompt is written {"prompt": ""} in a .jsonl file)'
        )
    if name.lower().endswith(".txt"):
        return [line.strip() for line in lines]
    return [_json_prompt(line, f"{name} line {i}") for i, line in enumerate(lines, 1)]


def _other_file(text: str) -> bool:
    """Whether a text names a file that is no prompt list."""
    if len(text.split()) == 1 and text.lower().endswith(_OTHERS):
        return True
    try:
        return bool(Path(text).suffix) and Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with what no name has
        return False


def _json_prompt(line: str, where: str) -> str:
    value: Any = parse_json(line, where)
    if isinstance(value, dict):
        value = value.get("prompt", value.get("text"))
    if not isinstance(value, str):
        raise UserError(f'{where} must be a text or an object with "prompt" or "text"')
    return value
