"""A folder of pictures, each with its caption, and further columns in subfolders or named by a table.

Captions are ``.txt``, ``.caption`` or ``.json`` files beside the pictures, or the lines of ``metadata.jsonl`` or
``metadata.csv``.
A column lies in the subfolder of its name, in files called as the pictures are, or is a key of the table. Whatever else
lies there stops the run: what a user gives is read, or named.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from visiontune.data import captions, metadata
from visiontune.data.base import SEGMENTS, Config, Sample, Source, default_from, listed, source, words_of
from visiontune.data.metadata import Row
from visiontune.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# Subfolders that hold pictures where none lie beside them.
_HOMES = {"image": ("chosen", "target")}
# What an objective would have to need, by the name of a subfolder, key or column.
_CLAIMS = {name: name for name in ("mask", "region", "source", "target", "reference", "clip", "rejected", "chat")}
_CLAIMS["chosen"] = "rejected"
# What explains data or the folder, and holds none.
_DOCUMENTS = ("thumbs.db", "desktop.ini", "license", "license.txt", "dataset_infos.json", "dataset_info.json")


@dataclass
class _Listing:
    """What lies in the folder of the main column: rows by name, files that were read, and keys that nothing reads."""

    rows: dict[str, Row]
    used: set[Path]
    unread: list[tuple[str, str]]


def read_folder(
    folder: Path, config: Config, columns: Sequence[str] = ("image",), optional: Sequence[str] = ()
) -> list[Sample]:
    """Samples in the order of their file names.

    A caption without a picture, and a picture without its partner in another column, become samples of which a file
    does not exist, for preflight to report.

    Args:
        folder: of the dataset.
        config: names columns, and what to ignore.
        columns: those that every sample must have; the first is the main one, beside which captions lie.
        optional: those that are read where they are there.

    Raises:
        UserError: no pictures, a column that is not there, two kinds of captions, captions that cannot be read, or
            something that would be left out.
    """
    listing = _read(folder, config, columns, optional)
    refuse_left_out(folder, listing.used, config, listing.unread)
    return [
        Sample(
            id=name,
            sources={column: source(column, file) for column, file in row.files.items()} | _segments(row),
            caption=words_of(row.caption, config),
            caption_from=default_from(row.where) if row.caption is None else row.where,
            nouns=tuple(row.nouns),
            weight=row.weight,
            scores=row.scores,
            set=row.set,
        )
        for name, row in sorted(listing.rows.items())
    ]


def _segments(row: Row) -> dict[str, Source]:
    return {SEGMENTS: Source(partial(_packed, list(row.nouns.values())), "segments")} if row.nouns else {}


def _packed(files: Sequence[Path]) -> Image.Image:
    from visiontune.data import pictures, segments

    return segments.packed([pictures.read_mask(file) for file in files])


def _read(folder: Path, config: Config, columns: Sequence[str], optional: Sequence[str]) -> _Listing:
    """Rows with all their columns, the files that were read, and keys that nothing reads."""
    main, *others = columns
    home = _home(folder, main, config)
    listing = _list(home, folder, config, main, others, optional)
    rows = listing.rows
    for column in (*others, *optional):
        if column == SEGMENTS:
            _check_nouns(folder, rows, config, column in others)
        elif not any(column in row.files for row in rows.values()):
            _add_column(folder / config.key(column), column, rows, main, home, config, column in others)
    given = dict.fromkeys(column for row in rows.values() for column in row.files)
    for name, row in rows.items():
        # Where other rows have a column, this one lacks a file, which preflight will miss.
        row.files = {c: row.files.get(c, folder / config.key(c) / name) for c in given}
    read = {file for row in rows.values() for file in (*row.files.values(), *row.nouns.values())}
    return replace(listing, used={*listing.used, *read})


def _check_nouns(folder: Path, rows: dict[str, Row], config: Config, needed: bool) -> None:
    """Refuse pictures of whose nouns nothing is known, where they must be or those of others are."""
    bare = [name for name, row in rows.items() if not row.nouns]
    if bare and (needed or len(bare) < len(rows)):
        raise UserError(
            f"{folder} has no masks of nouns for {listed(bare)}: name them in metadata.jsonl, "
            f'"{config.key(SEGMENTS)}": [["cat", "masks/0_cat.png"], ...] (data.columns.{SEGMENTS} gives another name)'
        )


def captions_of(folder: Path, ignore: Sequence[str] = ()) -> dict[Path, str | None]:
    """Pictures of a flat folder with their captions on one line each, by the rules of :func:`read_folder`.

    Nothing is substituted in them. The file of a caption without a picture does not exist; the caption of a picture
    without one is ``None``.
    """
    config = Config(root=str(folder), ignore=list(ignore))
    rows = _list(folder, folder, config, "image", [], []).rows
    found = {row.files["image"]: row.caption for _, row in sorted(rows.items())}
    return {file: None if text is None else captions.words(text) for file, text in found.items()}


def refuse_left_out(
    folder: Path, used: Collection[Path], config: Config, unread: Collection[tuple[str, str]] = ()
) -> None:
    """Stop where something lies in a folder that nothing reads.

    Args:
        folder: of the dataset.
        used: what is read.
        config: says what to ignore.
        unread: names and places of keys or columns that hold pictures and that nothing reads.

    Raises:
        UserError: one line that lists it.
    """
    if config.ignores_all:
        return
    places = _left_in(folder, used, config) | {name: f"'{name}' in {place}" for name, place in unread}
    if not places:
        return
    claims = sorted({_CLAIMS[name] for name in places if name in _CLAIMS})
    would = f"an objective that needs {' or '.join(claims)} would read such pictures; " if claims else ""
    names = f"[{','.join(places)}]" if len(places) < 5 else "all"
    raise UserError(
        f"{folder} holds what nothing reads here: {listed(list(places.values()))}; {would}move it away, or go on "
        f"without it by data.ignore={names}"
    )


def ignored(folder: Path, config: Config, columns: Sequence[str], used: Collection[Path] | None = None) -> list[str]:
    """What lies in a folder and is left out because ``config`` says so, subfolders with the number of their files.

    Args:
        folder: of the dataset. columns: those that were read. used: what was read, if not by :func:`read_folder`.
    """
    if used is None:
        used = _read(folder, config, columns, ()).used
    everything = _left_in(folder, used, replace(config, ignore=[]))
    kept = {} if config.ignores_all else _left_in(folder, used, config)
    return [shown for name, shown in everything.items() if name not in kept]


# ---------------------------------------------------------------------------------------------------- files


def _home(folder: Path, main: str, config: Config) -> Path:
    """Where the main column lies: beside each other in the folder, or in a subfolder of its own."""
    if not _pictures(folder) and metadata.table_in(folder) is None:
        for name in (config.key(main), *_HOMES.get(main, ())):
            if (folder / name).is_dir() and not config.ignores(name):
                return folder / name
    return folder


def _list(
    home: Path, folder: Path, config: Config, main: str, others: Sequence[str], optional: Sequence[str]
) -> _Listing:
    """Pictures and captions of the main column's folder, and the columns that its table names."""
    table = metadata.table_in(home)
    pictures = [f for f in _pictures(home) if not config.ignores(_name(f, folder))]
    given = [f for f in sorted(home.iterdir()) if not config.ignores(_name(f, folder))]
    texts = captions.beside(given, {f.stem for f in pictures})
    if table is None:
        if config.weight_column is not None:
            raise UserError(
                f"{folder} has no metadata.jsonl or metadata.csv with '{config.weight_column}': write one, or leave "
                "data.weight_column out"
            )
        if not pictures and not texts:
            raise UserError(_nothing_in(folder))
        return _Listing(_beside(home, main, pictures, texts, config), {*pictures, *texts.values()}, [])
    both = [f.name for f in pictures if f.stem in texts]
    if both:
        kinds = " and ".join(sorted({texts[Path(name).stem].suffix for name in both}))
        raise UserError(f"{folder} has {table.name} and also {kinds} captions for {listed(both)}: keep one kind")
    rows, unread = metadata.rows(table, config, main, others, optional)
    named = {file for row in rows.values() for file in row.files.values()} | metadata.ignored_files(table, config)
    rows |= {f.name: Row(None, {main: f}) for f in pictures if f not in named}
    return _Listing(rows, {table, *pictures}, unread)


def _pictures(folder: Path) -> list[Path]:
    from visiontune.data import pictures

    return pictures.in_folder(folder)


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _beside(home: Path, main: str, pictures: list[Path], texts: dict[str, Path], config: Config) -> dict[str, Row]:
    """Rows of pictures with caption files, and of caption files without a picture."""
    words = {stem: captions.read(file, config.caption_column) for stem, file in texts.items()}
    kinds = {stem: f"{file.suffix.lower()} files" for stem, file in texts.items()}
    rows = {f.name: Row(words.get(f.stem), {main: f}, kinds.get(f.stem, "")) for f in pictures}
    for stem in texts.keys() - {f.stem for f in pictures}:
        # No picture has this stem, so the file named here does not exist.
        rows[texts[stem].name] = Row(words[stem], {main: home / f"{stem}.png"})
    return rows


def _add_column(
    place: Path, column: str, rows: dict[str, Row], main: str, home: Path, config: Config, needed: bool
) -> None:
    """Give the rows their files of a subfolder; a file without a row gets one, without the file of its main column."""
    if not place.is_dir() or config.ignores(config.key(column)):
        if not needed:
            return
        beside = "chosen, with the captions, and rejected" if column == "rejected" else place.name
        raise UserError(
            f"{place.parent} has no '{column}' pictures: put them into the subfolder {beside}, in files called as the "
            f"pictures are, or name them as '{place.name}' in metadata.jsonl (data.columns.{column} gives another name)"
        )
    files = _by_stem(place)
    for name, row in rows.items():
        row.files[column] = files.get(_stem(name), place / Path(name).with_suffix(".png"))
    taken = {_stem(name) for name in rows}
    for stem, file in files.items():
        if stem not in taken:
            name = _name(file, place)
            rows[f"{place.name}/{name}"] = Row(None, {main: home / name, column: file})


def _by_stem(folder: Path) -> dict[str, Path]:
    from visiontune.data.pictures import is_picture

    found: dict[str, Path] = {}
    for file in sorted(f for f in folder.rglob("*") if is_picture(f) and f.is_file()):
        stem = _stem(_name(file, folder))
        if stem in found:
            raise UserError(f"{folder} has {found[stem].name} and {file.name} for one picture: keep one of them")
        found[stem] = file
    return found


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _left_in(folder: Path, used: Collection[Path], config: Config) -> dict[str, str]:
    """What is not used, in words, by its name: files of the folder, and subfolders with the number of their files."""
    found: dict[str, str] = {}
    counts: dict[str, int] = {}
    homes = {file.parent for file in used}
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(f for f in folders if _given(here / f, folder, config))
        for inner in (here / f for f in folders if (here / f).is_symlink() and here / f not in homes):
            found[_name(inner, folder)] = f"{_name(inner, folder)}/ (a link to a folder)"
        for file in sorted(here / f for f in files if _given(here / f, folder, config)):
            if file in used:
                continue
            name = _name(file, folder)
            top, *deeper = name.split("/")
            if deeper and here not in homes:
                counts[top] = counts.get(top, 0) + 1
            else:
                found[name] = name if file.exists() else f"{name} (a link to nothing)"
    for top, count in counts.items():
        found[top] = f"{top}/ ({count} file{'s' if count > 1 else ''})"
    return found


def _given(file: Path, folder: Path, config: Config) -> bool:
    """Whether something is data, as far as its name tells."""
    name = file.name.lower()
    document = name in _DOCUMENTS or name.endswith(".md")
    return not (document or name.startswith(".") or name == "__macosx" or config.ignores(_name(file, folder)))


def _nothing_in(folder: Path) -> str:
    from visiontune.data.pictures import is_picture

    inner = sorted({f.parent for f in folder.rglob("*") if is_picture(f)})
    hint = f"; there are images in {inner[0]}: set data.root to it" if inner else ""
    return f"no images in {folder} (looked for .png, .jpg and whatever else Pillow opens){hint}"
