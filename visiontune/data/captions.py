"""The one way in which caption files are read: ``.txt``, ``.caption`` or ``.json`` files beside pictures."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from visiontune import outside
from visiontune.errors import UserError

SUFFIXES = (".txt", ".caption")
_OBJECT = ".json"
# What a caption is called in tables and objects, and what others call it in an object.
DEFAULT_KEY = "text"
_OTHERS = ("caption", "prompt")
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def names_side(caption: str) -> bool:
    """Whether a caption says left or right, so that it is not true of a picture that is mirrored."""
    return _SIDES.search(caption) is not None


def read_text(file: str | Path, what: str = "caption file") -> str:
    """The content of a UTF-8 file, without a byte-order mark.

    Raises:
        UserError: it cannot be read, is in another encoding, or has null characters, as UTF-16 has.
    """
    text = outside.read_text(file, what)
    if "\0" in text:
        raise UserError(f"{what} '{outside.shown(str(file))}' has null characters: save it as UTF-8 text")
    return text


def beside(files: Sequence[Path], stems: Collection[str]) -> dict[str, Path]:
    """The caption files among those of a folder, by their names without the ending.

    Args:
        files: of one folder. stems: of its pictures, without which a ``.json`` file is no caption.

    Raises:
        UserError: two of them have one such name.
    """
    found: dict[str, Path] = {}
    for file in files:
        kind = file.suffix.lower()
        is_caption = kind in SUFFIXES or (kind == _OBJECT and file.stem in stems)
        if is_caption and not file.name.startswith(".") and file.is_file():
            if file.stem in found:
                names = f"{found[file.stem].name} and {file.name}"
                raise UserError(
                    f"{file.parent} has captions in {names}: keep one of them, or leave one kind out by "
                    f"data.ignore='*{found[file.stem].suffix}'"
                )
            found[file.stem] = file
    return found


def read(file: Path, key: str) -> str | None:
    """The caption in a file: its text, or what stands in a ``.json`` object.

    Args:
        key: of the object, which may call it ``caption`` or ``prompt`` where it has no ``text``.

    Raises:
        UserError: the file cannot be read, has no such key, or several that differ.
    """
    if file.suffix.lower() != _OBJECT:
        return read_text(file)
    value = outside.read_json(file, "caption file")
    there = value if isinstance(value, dict) else {}
    keys = (key, *_OTHERS) if key == DEFAULT_KEY and key not in there else (key,)
    found = {name: there[name] for name in keys if name in there}
    if not found:
        wanted = " or ".join(f"'{name}'" for name in keys)
        raise UserError(
            f"{file} is no object with {wanted}: name the key of its caption by "
            "data.caption_column, or leave it out by data.ignore='*.json'"
        )
    texts = {name: caption_text(text, str(file)) for name, text in found.items()}
    if len(set(texts.values())) > 1:
        raise UserError(f"{file} has {' and '.join(texts)}, which differ: choose one by data.caption_column")
    return next(iter(texts.values()))


def words(text: str) -> str:
    """A caption's words, single spaces between them."""
    return " ".join(text.split())


def caption_text(value: Any, where: str) -> str | None:
    """A caption as it stands in a table, text or nothing. Raises UserError for anything else."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"the caption in {where} is {type(value).__name__}, not text: name another data.caption_column")
    return value
