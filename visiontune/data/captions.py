"""The one way in which caption files are read: ``.txt`` or ``.caption`` files beside pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visiontune import outside
from visiontune.errors import UserError

SUFFIXES = (".txt", ".caption")


def read_text(file: str | Path, what: str = "caption file") -> str:
    """The content of a UTF-8 file, without a byte-order mark.

    Raises:
        UserError: it cannot be read, is in another encoding, or has null characters, as UTF-16 has.
    """
    text = outside.read_text(file, what)
    if "\0" in text:
        raise UserError(f"{what} '{outside.shown(str(file))}' has null characters: save it as UTF-8 text")
    return text


def in_folder(folder: Path) -> dict[str, Path]:
    """The caption files that lie in a folder, by their names without the ending.

    Raises:
        UserError: two of them have one such name.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file():
            if file.stem in found:
                raise UserError(f"{folder} has captions in {found[file.stem].name} and {file.name}: keep one of them")
            found[file.stem] = file
    return found


def words(text: str) -> str:
    """A caption's words, single spaces between them."""
    return " ".join(text.split())


def caption_text(value: Any, where: str) -> str | None:
    """A caption as it stands in a table, text or nothing. Raises UserError for anything else."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"the caption in {where} is {type(value).__name__}, not text: name another data.caption_column")
    return value
