"""Tables of captions: the lines of ``metadata.jsonl`` or ``metadata.csv``, as Hugging Face's image folders have."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visiontune.data import captions
from visiontune.data.base import SEGMENTS, Config, weight_of
from visiontune.data.scores import shares
from visiontune.errors import UserError
from visiontune.files import inside
from visiontune.outside import parse_json
from visiontune.schema import nearest

TABLES = ("metadata.jsonl", "metadata.csv")


@dataclass
class Row:
    """One sample in the making.

    Attributes:
        caption: ``None`` where it has none.
        files: that of each column.
        where: what the caption comes from.
        nouns: the mask of each noun of the caption. weight: factor of its loss. scores: its ratings.
        set: which set it is of.
    """

    caption: str | None
    files: dict[str, Path] = field(default_factory=dict)
    where: str = ""
    nouns: dict[str, Path] = field(default_factory=dict)
    weight: float = 1.0
    scores: tuple[float, ...] = ()
    set: str = ""


def table_in(folder: Path) -> Path | None:
    """The table of a folder, if it has one. Raises UserError for two."""
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has {' and '.join(f.name for f in found)}: keep one of them")
    return found[0] if found else None


def rows(
    file: Path, config: Config, main: str, others: Sequence[str], optional: Sequence[str]
) -> tuple[dict[str, Row], list[tuple[str, str]]]:
    """Rows by the names of their main files, and the keys of pictures that nothing reads."""
    from visiontune.data.pictures import is_picture

    subfolders = {c for c in (*others, *optional) if (file.parent / config.key(c)).is_dir()}
    lines = list(_lines(file))
    if not lines:
        raise UserError(f"{file} has no lines: write one for each picture, or remove it")
    given = {key for _, line in lines for key in line if not config.ignores(key)}
    wanted = [c for c in (*others, *optional) if config.key(c) in given or (c in others and c not in subfolders)]
    grounded = SEGMENTS in wanted
    wanted = [c for c in wanted if c != SEGMENTS]
    name_key = config.columns.get(main, "file_name")
    sets = config.key("set") if config.set_size > 1 else None
    known = {name_key, config.caption_column, *map(config.key, (*wanted, SEGMENTS))}
    unread: dict[str, None] = {}
    found: dict[str, Row] = {}
    for where, line in lines:
        name, caption = _main_of(where, line, name_key, config.caption_column)
        if name in found:
            raise UserError(f"{where} captions {name} a second time: keep one line for it")
        found[name] = Row(caption, {main: inside(file.parent, name, where)}, file.name)
        if config.weight_column is not None:
            found[name].weight = weight_of(line.get(config.weight_column), where)
        found[name].scores = shares(line, config.scores, where)
        if sets is not None:
            found[name].set = _set_of(line.get(sets), f"{where}: '{sets}'")
        if grounded:
            key = config.key(SEGMENTS)
            found[name].nouns = _nouns(file.parent, line.get(key), f"{where}: '{key}'")
        for column in wanted:
            key = config.key(column)
            if not isinstance(line.get(key), str):
                near = "" if key in line else nearest(key, line)
                raise UserError(f"{where} names no file as '{key}'{near} (data.columns.{column})")
            found[name].files[column] = inside(file.parent, line[key], where)
        unread |= dict.fromkeys(
            key
            for key, value in line.items()
            if key not in known and key in given and isinstance(value, str) and is_picture(Path(value))
        )
    return found, [(key, file.name) for key in unread]


def _set_of(told: Any, where: str) -> str:
    if not isinstance(told, str | int) or not str(told).strip():
        raise UserError(f"{where} is no name of a set: write the same word for all pictures that belong together")
    return str(told).strip()


def _nouns(folder: Path, told: Any, where: str) -> dict[str, Path]:
    """Masks of nouns of a list ``[[noun, file or null], ...]``; nouns without a file are left out."""
    shape = isinstance(told, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str | None)
        for pair in told
    )
    nouns = [pair[0].strip() for pair in told if pair[1] is not None] if shape else []
    if not shape or not all(nouns) or len({*nouns}) < len(nouns):
        raise UserError(
            f"{where} is no list of nouns and their masks, each noun once: write "
            '[["cat", "masks/0_cat.png"], ["sofa", null]]'
        )
    return {noun: inside(folder, mask, where) for noun, mask in told if mask is not None for noun in [noun.strip()]}


def _main_of(where: str, line: dict[str, Any], name_key: str, words: str) -> tuple[str, str | None]:
    if not isinstance(line.get(name_key), str):
        raise UserError(f"{where} has no {name_key}: write {{'{name_key}': 'a.png', '{words}': '...'}}")
    if words not in line:
        raise UserError(f"{where} has no '{words}'{nearest(words, line)} (data.caption_column)")
    return Path(line[name_key]).as_posix(), captions.caption_text(line[words], where)


def ignored_files(file: Path, config: Config) -> set[Path]:
    """The files that the keys name which are to be left out."""
    names = (value for _, line in _lines(file) for key, value in line.items() if config.ignores(key))
    return {file.parent / name for name in names if isinstance(name, str)}


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a table as mappings, each with where it stands."""
    text = captions.read_text(file, "table")
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                where = f"{file} line {reader.line_num}"
                if None in row:
                    raise UserError(f"{where} has more cells than the first line: put texts with commas in quotes")
                # CSV cannot tell an empty text from none.
                yield where, {key: value or None for key, value in row.items()}
        except csv.Error as error:
            raise UserError(f"{file} line {reader.reader.line_num} is not CSV: {error}") from error
        return
    for number, written in enumerate(text.split("\n"), 1):
        if not written.strip():
            continue
        where = f"{file} line {number}"
        line = parse_json(written, where)
        if not isinstance(line, dict):
            raise UserError(f"{where} is {type(line).__name__}, not an object: write {{'file_name': 'a.png', ...}}")
        yield where, line
