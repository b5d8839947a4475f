"""What comes from outside: files that a user names and text in them, read whole or refused in one line."""

from __future__ import annotations

import itertools
import json
import os
import stat
from pathlib import Path
from typing import Any

from visiontune.errors import UserError

# Longer than any list of prompts, table of rows or recipe that a person has.
MOST_BYTES = 1 << 30
# File systems take 255; a file has a longer name while it is written.
LONGEST_NAME = 220
_PATIENCE = 0.1  # seconds that a regular expression may take for one text
# Each level of brackets may double the time in which one is compiled, which no patience bounds.
_LONGEST_PATTERN, _DEEPEST_PATTERN = 1000, 8


def expanded(path: str | Path, what: str = "file") -> Path:
    """``path`` with ``~`` put in, whatever lies there.

    Raises:
        UserError: nothing can have such a name.
    """
    given = os.fspath(path)
    try:
        if b"\0" in os.fsencode(given):
            raise ValueError("embedded null byte")
        return Path(given).expanduser()
    except (ValueError, RuntimeError) as error:
        # Half of a character, or `~nobody`.
        raise UserError(f"'{shown(given)}' is no name of a {what}: {error}") from error


def regular(path: str | Path, what: str = "file") -> Path:
    """``path`` with ``~`` put in, where a regular file lies: a pipe or a device could be read for ever.

    Args:
        path: as the user gave it.
        what: what the file is, for messages.

    Raises:
        UserError: nothing is there, or something else than a file, or no file can have such a name.
    """
    given, file = os.fspath(path), expanded(path, what)
    try:
        mode = file.stat().st_mode
    except FileNotFoundError as error:
        raise UserError(f"there is no {what} '{shown(given)}'") from error
    except OSError as error:
        raise UserError(f"{what} '{shown(given)}' cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"{what} '{shown(given)}' is {kind}: name a file")
    return file


def target(path: str | Path, what: str = "file") -> Path:
    """``path`` with ``~`` put in, where a file or folder can come to lie; nothing is made.

    Args:
        path: as the user gave it.
        what: what is to be there, for messages.

    Raises:
        UserError: no file can have such a name, or what stands above it is no folder.
    """
    given, place = os.fspath(path), expanded(path, what)
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in place.parts):
        raise UserError(f"{what} '{shown(given)}' has a name of more than {LONGEST_NAME} bytes: take a shorter one")
    try:
        os.stat(place)
    except FileNotFoundError:
        pass
    except NotADirectoryError as error:
        file = next(above for above in place.parents if above.is_file())
        raise UserError(
            f"{shown(str(file))} is a file: choose another place than '{shown(given)}' for {what}"
        ) from error
    except OSError as error:
        raise UserError(f"{what} '{shown(given)}' cannot be: {error.strerror or error}, choose another") from error
    return place


def is_folder(path: str | Path) -> bool:
    """Whether a folder lies at ``path``, with ``~`` put in; a name that nothing can have is none."""
    try:
        return expanded(path).is_dir()
    except (OSError, UserError):
        return False


def read_bytes(path: str | Path, what: str = "file", most: int = MOST_BYTES) -> bytes:
    """The content of a file.

    Raises:
        UserError: see :func:`regular`; or it is larger than ``most`` bytes.
    """
    file = regular(path, what)
    try:
        size = file.stat().st_size
        if size > most:
            raise UserError(f"{what} '{shown(str(path))}' has {size} bytes, more than the {most} that one may have")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{what} '{shown(str(path))}' cannot be read: {error.strerror or error}") from error


def read_text(path: str | Path, what: str = "file", most: int = MOST_BYTES) -> str:
    """The content of a UTF-8 file, without a byte-order mark.

    Raises:
        UserError: see :func:`read_bytes`; or it is in another encoding.
    """
    try:
        return read_bytes(path, what, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} '{shown(str(path))}' is not UTF-8 text: save it as UTF-8") from error


def parse_json(text: str | bytes, where: str) -> Any:
    """The value that ``text`` spells.

    Args:
        text: JSON of any length and depth.
        where: the file, and what of it, for messages.

    Raises:
        UserError: it is not JSON, or nests or counts further than can be read, or holds halves of characters.
    """
    try:
        # Given bytes, json would guess at their encoding, and take halves of characters.
        given = text.decode() if isinstance(text, bytes) else text
        value = json.loads(given)
        # Halves of characters can be read but not written.
        if "\\u" in given or not given.isascii():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half of a character: write the character itself") from error
    except RecursionError as error:
        raise UserError(f"{where} nests too deep to be read") from error
    except ValueError as error:
        raise UserError(f"{where} holds a number of too many digits") from error
    return value


def read_json(path: str | Path, what: str = "file", most: int = MOST_BYTES) -> Any:
    """The value that a JSON file holds.

    Raises:
        UserError: see :func:`read_text` and :func:`parse_json`.
    """
    return parse_json(read_text(path, what, most), f"{what} '{shown(str(path))}'")


def matches(pattern: str, text: str, where: str, by_end: bool = False) -> bool:
    """Whether a regular expression of the outside matches all of ``text``, found in bounded time.

    Args:
        where: what the pattern is, for messages.
        by_end: whether it may also match what follows a dot in it.

    Raises:
        UserError: it is none, is longer or deeper than names need, or takes longer than a tenth of a second.
    """
    import regex

    if len(pattern) > _LONGEST_PATTERN or _depth(pattern) > _DEEPEST_PATTERN:
        raise UserError(f"{where} '{shown(pattern)}' is longer or nests deeper than names do: write it shorter")
    try:
        whole = rf"(.*\.)?({pattern})" if by_end else pattern
        return regex.fullmatch(whole, text, timeout=_PATIENCE) is not None
    except regex.error as error:
        raise UserError(
            f"{where} '{shown(pattern)}' is no regular expression ({error}): '.*' stands for any text"
        ) from error
    except TimeoutError as error:
        raise UserError(
            f"{where} '{shown(pattern)}' takes too long to match: write it without nested repeats"
        ) from error
    except (MemoryError, OverflowError, RecursionError) as error:
        raise UserError(f"{where} '{shown(pattern)}' is too large to be matched: write it shorter") from error


def _depth(pattern: str) -> int:
    return max(itertools.accumulate({"(": 1, ")": -1}.get(c, 0) for c in pattern), default=0)


def shown(text: str) -> str:
    """``text`` as an error message may show it: short, on one line, and in characters that a terminal has."""
    plain = text if text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= 200 else f"{plain[:120]}...{plain[-60:]}"
