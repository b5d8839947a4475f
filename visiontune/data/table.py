"""Tables of images that Hugging Face's ``datasets`` can load: parquet files and datasets of the Hub."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from visiontune.data.base import Config, Sample, caption_text, captioned
from visiontune.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


def read_table(config: Config, path: str, **options: Any) -> list[Sample]:
    """Samples in the order of the rows of ``config.split``.

    Args:
        config: names the columns and the split.
        path: what ``datasets.load_dataset`` is asked for.
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
    if image not in table.column_names:
        raise UserError(f"dataset {config.root} has no column '{image}' {columns}: set data.image_column")
    if text not in table.column_names and not config.prompt:
        raise UserError(
            f"dataset {config.root} has no column '{text}' {columns}: set data.caption_column, or data.prompt for one"
            " caption for all"
        )
    captions = table[text] if text in table.column_names else [None] * len(table)
    try:
        pictures = table.select_columns(image).cast_column(image, datasets.Image())
    except (TypeError, ValueError, OSError) as error:
        raise UserError(
            f"column '{image}' of {config.root} holds no images {columns}: set data.image_column"
        ) from error
    samples = []
    for i, words in enumerate(captions):
        caption = caption_text(words, f"row {i} of {config.root}")
        samples.append(captioned(f"{config.split}[{i}]", partial(_picture, pictures, i, image), caption, config))
    return samples


def _picture(table: Any, row: int, column: str) -> Image.Image:
    return table[row][column]
