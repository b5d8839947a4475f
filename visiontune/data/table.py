"""Tables of pictures that Hugging Face's ``datasets`` can load: parquet files and datasets of the Hub."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune.data.base import SEGMENTS, Config, Sample, default_from, listed, source, weight_of, words_of
from visiontune.data.captions import caption_text
from visiontune.data.scores import shares
from visiontune.errors import UserError
from visiontune.files import inside

if TYPE_CHECKING:
    from PIL import Image


def read_table(
    config: Config, path: str, columns: Sequence[str] = ("image",), optional: Sequence[str] = (), **options: Any
) -> list[Sample]:
    """Samples in the order of the rows of ``config.split``.

    Args:
        config: names the columns and the split.
        path: what ``datasets.load_dataset`` is asked for.
        columns: those that the table must have; optional: those that are read where it has them.
        options: further arguments of ``load_dataset``.

    Raises:
        UserError: the dataset cannot be loaded, lacks a column, or has pictures in a column that nothing reads.
    """
    if SEGMENTS in columns:
        raise UserError(
            f"masks of nouns are read of a folder's metadata.jsonl, and {config.root} is a table: write it out as one"
        )
    # By name: a type checker run in a checkout takes the catalogue folder datasets/ for the package.
    datasets: Any = import_module("datasets")
    try:
        table = datasets.load_dataset(path, split=config.split, **options)
    except Exception as error:  # errors of the hub, of pyarrow and of its own come through the loader
        reason = " ".join(str(error).split())[:200]
        mend = "check the name and the network, or download it and give its folder"
        if path == "parquet" or Path(path).exists():
            mend = "give a whole parquet file with rows of that split"
        what = f"cannot load dataset {config.root} (split '{config.split}')"
        raise UserError(f"{what}: {type(error).__name__}: {reason}; {mend}") from error
    names = _names(table, config, columns, optional)
    text, has = config.caption_column, f"(it has {', '.join(table.column_names)})"
    if text not in table.column_names and not config.prompt:
        raise UserError(
            f"dataset {config.root} has no column '{text}' {has}: set data.caption_column, or data.prompt for one"
            " caption for all"
        )
    column_words = f"column '{text}'" if text in table.column_names else ""
    words = table[text] if text in table.column_names else [None] * len(table)
    pictures = {}
    for column, name in names.items():
        try:
            pictures[column] = table.select_columns(name).cast_column(name, datasets.Image(decode=False))
        except (TypeError, ValueError, OSError, NotImplementedError) as error:  # the last is pyarrow's
            raise UserError(
                f"column '{name}' of {config.root} holds no images {has}: set data.columns.{column}"
            ) from error
    _refuse_unread(table, config, names.values())
    weights, scores = _weights(table, config), _scores(table, config)
    return [
        Sample(
            id=f"{config.split}[{i}]",
            sources={c: source(c, partial(_picture, pictures[c], i, name, config)) for c, name in names.items()},
            caption=words_of(caption_text(caption, f"row {i} of {config.root}"), config),
            caption_from=default_from(column_words) if caption is None else column_words,
            weight=weights[i],
            scores=scores[i],
        )
        for i, caption in enumerate(words)
    ]


def _weights(table: Any, config: Config) -> list[float]:
    """How much each row counts."""
    name = config.weight_column
    if name is None:
        return [1.0] * len(table)
    if name not in table.column_names:
        raise UserError(f"dataset {config.root} has no column '{name}' (it has {', '.join(table.column_names)}): "
                        "set data.weight_column")  # fmt: skip
    return [weight_of(told, f"row {i} of {config.root}") for i, told in enumerate(table[name])]


def _scores(table: Any, config: Config) -> list[tuple[float, ...]]:
    """The ratings of each row; a column that is not there rates none."""
    given = {name: table[name] for name in config.scores if name in table.column_names}
    rated = ({name: column[i] for name, column in given.items()} for i in range(len(table)))
    return [shares(told, config.scores, f"row {i} of {config.root}") for i, told in enumerate(rated)]


def _names(table: Any, config: Config, columns: Sequence[str], optional: Sequence[str]) -> dict[str, str]:
    """What the columns that are read are called in the table."""
    there = [name for name in table.column_names if not config.ignores(name)]
    for column in columns:
        if config.key(column) not in there:
            raise UserError(
                f"dataset {config.root} has no column '{config.key(column)}' (it has {', '.join(table.column_names)}): "
                f"set data.columns.{column}"
            )
    return {column: config.key(column) for column in (*columns, *optional) if config.key(column) in there}


def _refuse_unread(table: Any, config: Config, read: Collection[str]) -> None:
    there = [name for name in table.column_names if not config.ignores(name)]
    known = {*read, config.caption_column}
    unread = [name for name in there if name not in known and _holds_pictures(table.features[name])]
    if unread and not config.ignores_all:
        raise UserError(
            f"dataset {config.root} has pictures that nothing reads here, in {listed(unread)}: take an objective that "
            f"needs them (data.columns gives them its names), or go on without them by data.ignore=[{','.join(unread)}]"
        )


def _holds_pictures(feature: Any) -> bool:
    """Whether a column is of pictures, or of encoded files as pictures are stored in parquet."""
    return type(feature).__name__ == "Image" or (isinstance(feature, dict) and {"bytes", "path"} == set(feature))


def _picture(table: Any, row: int, column: str, config: Config) -> Image.Image:
    """A picture of a table, which holds its bytes, or names a file in the table's folder.

    Raises:
        UserError: the name leads elsewhere: to another file of this machine, or to a server.
    """
    from PIL import Image

    cell, root = table[row][column], Path(config.root).expanduser()
    if cell["bytes"] is not None:
        return Image.open(io.BytesIO(cell["bytes"]))
    name, home = str(cell["path"]), root if root.is_dir() else root.parent
    if not root.exists():
        home = Path(import_module("datasets").config.HF_DATASETS_CACHE)  # what was fetched from the Hub with the table
    if Path(name).is_relative_to(home):
        name = str(Path(name).relative_to(home))
    return Image.open(inside(home, name, f"row {row} of {config.root}"))
