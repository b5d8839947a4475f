"""Tables of images that Hugging Face's ``datasets`` can load: parquet files and datasets of the Hub."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from visiontune.data.base import Config, Sample, caption_text, captioned
from visiontune.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


def read_table(config: Config, path: str, *, pairs: bool = False, **options: Any) -> list[Sample]:
    """Samples in the order of the rows of ``config.split``.

    Args:
        config: names the columns and the split.
        path: what ``datasets.load_dataset`` is asked for.
        pairs: read the worse image of each row too.
        options: its further arguments.

    Raises:
        UserError: the dataset cannot be loaded, or lacks a column.
    """
    # By name: a type checker run in a checkout takes the catalogue folder datasets/ for the package.
    datasets: Any = import_module("datasets")
    try:
        table = datasets.load_dataset(path, split=config.split, **options)
    except Exception as error:  # errors of the hub, of pyarrow and of its own come through the loader
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load dataset {config.root} (split '{config.split}'): {type(error).__name__}: {reason}; check the"
            " name and the network, or download it and give its folder"
        ) from error
    image, text = config.image_column, config.caption_column
    columns = f"(it has {', '.join(table.column_names)})"
    wanted = {"image_column": image} | ({"rejected_column": config.rejected_column} if pairs else {})
    for key, column in wanted.items():
        if column not in table.column_names:
            raise UserError(f"dataset {config.root} has no column '{column}' {columns}: set data.{key}")
    if text not in table.column_names and not config.prompt:
        raise UserError(
            f"dataset {config.root} has no column '{text}' {columns}: set data.caption_column, or data.prompt for one"
            " caption for all"
        )
    captions = table[text] if text in table.column_names else [None] * len(table)
    pictures = {}
    for key, column in wanted.items():
        try:
            pictures[key] = table.select_columns(column).cast_column(column, datasets.Image())
        except (TypeError, ValueError, OSError, NotImplementedError) as error:  # the last is pyarrow's
            raise UserError(f"column '{column}' of {config.root} holds no images {columns}: set data.{key}") from error
    samples = []
    for i, words in enumerate(captions):
        caption = caption_text(words, f"row {i} of {config.root}")
        better, *worse = (partial(_picture, pictures[key], i, column) for key, column in wanted.items())
        sample = captioned(f"{config.split}[{i}]", better, caption, config)
        samples.append(replace(sample, rejected=worse[0]) if worse else sample)
    return samples


def _picture(table: Any, row: int, column: str) -> Image.Image:
    return table[row][column]
