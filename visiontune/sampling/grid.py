"""Sheets of images with captions; a clip is shown by its middle frame."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visiontune.data import pictures
from visiontune.errors import UserError

# What a picture can be taken from.
Source = Image.Image | np.ndarray | str | Path | IO[bytes]
_FONT_SIZE = 13
_LINE = 16
_CHARACTER = 7
_SMALL, _LARGE = 128, 256


def grid(
    images: Sequence[Source | None],
    columns: int,
    captions: Sequence[str] | None = None,
    *,
    row_captions: Sequence[str] | None = None,
    column_captions: Sequence[str] | None = None,
    title: str | None = None,
    cell: int | None = None,
    gap: int = 4,
) -> Image.Image:
    """Lay images out row by row on white.

    Args:
        images: pictures, ``uint8 [h, w, 3]`` arrays, clips ``[f, h, w, 3]``, paths or files; each is fitted into a
            square cell, and None leaves it white.
        columns: images in a row.
        captions: one text under each image.
        row_captions: one text left of each row.
        column_captions: one text above each column.
        title: one text above all.
        cell: side of a cell in pixels; by default the longest side of the first image, brought into 128 to 256.
        gap: pixels between cells.

    Raises:
        UserError: no images, fewer than one column, or a number of captions that does not fit.
    """
    if not images or columns < 1:
        raise UserError("a grid needs at least one image and one column")
    rows = -(-len(images) // columns)
    counts = (("captions", captions, len(images)), ("row_captions", row_captions, rows))
    for name, texts, n in (*counts, ("column_captions", column_captions, columns)):
        if texts is not None and len(texts) != n:
            raise UserError(f"a grid of {len(images)} images in {columns} columns needs {n} {name}, not {len(texts)}")
    first = next((source for source in images if source is not None), None)
    side = cell or (_SMALL if first is None else _cell_side(_open(first)))
    width_of_row = 160 if row_captions else 0
    under = [_wrap(text, side, 3) for text in captions or ()]
    above = [_wrap(text, side, 2) for text in column_captions or ()]
    width = width_of_row + columns * (side + gap) + gap
    top = _wrap(title, width - gap, 3) if title else []
    foot = _LINE * max(map(len, under), default=0)
    head = _LINE * (len(top) + max(map(len, above), default=0))
    step_x, step_y = side + gap, side + foot + gap
    sheet = Image.new("RGB", (width, head + rows * step_y + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)

    def write(x: int, y: int, lines: Sequence[str]) -> None:
        for i, line in enumerate(lines):
            draw.text((x, y + i * _LINE), line, fill="black", font=font)

    write(gap, 0, top)
    for column, lines in enumerate(above):
        write(width_of_row + gap + column * step_x, _LINE * len(top), lines)
    for row, text in enumerate(row_captions or ()):
        write(gap, head + gap + row * step_y, _wrap(text, width_of_row - gap, side // _LINE))
    for i, source in enumerate(images):
        x, y = width_of_row + gap + i % columns * step_x, head + gap + i // columns * step_y
        if source is not None:
            picture = _fit(_open(source), side)
            sheet.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2))
        if under:
            write(x, y + side, under[i])
    return sheet


def _open(source: Source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return Image.fromarray(still(source))
    shown = pictures.frames(Path(source) if isinstance(source, str) else source)
    return Image.fromarray(still(shown))


def still(image: np.ndarray) -> np.ndarray:
    """A picture ``[h, w, 3]`` as it is, and of a clip ``[f, h, w, 3]`` the middle frame."""
    return image[len(image) // 2] if image.ndim == 4 else image


def _cell_side(picture: Image.Image) -> int:
    side = max(picture.size)
    return side * -(-_SMALL // side) if side < _SMALL else min(side, _LARGE)


def _fit(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    # Enlarged pixels stay pixels: a pocket image must show what it is.
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def _wrap(text: str, width: int, most: int) -> list[str]:
    """Lines of a text for a width in pixels, the last one cut when there are too many."""
    return textwrap.wrap(text, max(width // _CHARACTER, 4), max_lines=max(most, 1), placeholder="…")
