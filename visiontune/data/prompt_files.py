"""Prompt lists: plain text, JSON lines, or given in place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from visiontune.errors import UserError

SUFFIXES = (".txt", ".jsonl")


def read_prompts(source: str | Sequence[str]) -> list[str]:
    """Prompts from a ``.txt`` file (one a line), a ``.jsonl`` file, one prompt, or a list of prompts.

    A line of a ``.jsonl`` file is a text or an object with the key ``prompt`` or ``text``; only there may a prompt be
    empty, for an unconditional image.

    Raises:
        UserError: the file is missing, empty, not UTF-8, or has an empty or malformed line.
    """
    if not isinstance(source, str):
        prompts = list(source)
        if not prompts:
            raise UserError("the list of prompts is empty: give at least one")
        return prompts
    file = Path(source).expanduser()
    if file.suffix not in SUFFIXES:
        if file.suffix and file.is_file():
            raise UserError(f"prompts file {file} must end in .txt or .jsonl")
        return read_prompts([source] if source.strip() else [])
    if not file.is_file():
        raise UserError(f"there is no prompts file {file}: correct the path, or give the prompts as a list")
    try:
        # Not splitlines: that would also break a prompt at a form feed or a Unicode line separator.
        text = file.read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        raise UserError(f"prompts file {file} is not UTF-8 text: save it as UTF-8") from error
    if not text:
        raise UserError(f"prompts file {file} is empty: write one prompt a line")
    lines = text.split("\n")
    empty = [str(i) for i, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise UserError(
            f"prompts file {file} has empty lines ({', '.join(empty[:10])}): remove them"
            ' (an empty prompt is written {"prompt": ""} in a .jsonl file)'
        )
    if file.suffix == ".txt":
        return [line.strip() for line in lines]
    return [_json_prompt(line, f"{file} line {i}") for i, line in enumerate(lines, 1)]


def _json_prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    if isinstance(value, dict):
        value = value.get("prompt", value.get("text"))
    if not isinstance(value, str):
        raise UserError(f'{where} must be a text or an object with "prompt" or "text"')
    return value
