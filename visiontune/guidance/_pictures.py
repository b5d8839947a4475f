"""Pictures and masks that terms are given, as latents of the size of what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from visiontune import outside
from visiontune.data import numbered, pictures
from visiontune.errors import UserError
from visiontune.guidance.base import Point, Run
from visiontune.ops.pixels import to_tensor

Picture = str | Image.Image
# White in a rectangle: left, top, width and height in pixels.
Mask = Picture | Sequence[int]


def check_picture(picture: Any, term: str, option: str = "picture") -> None:
    """Refuse what is no picture, before a model is opened: UserError naming the term and the option."""
    if isinstance(picture, str):
        if _numbered(picture, term, option) is None:
            pictures.size(_file(picture, term, option))
    elif not isinstance(picture, Image.Image):
        raise UserError(f"{term}: {option} must be a file, or a picture of Pillow, not {picture!r}")


def check_mask(mask: Any, term: str) -> None:
    """Refuse what is neither a picture nor a rectangle: UserError naming the term."""
    if isinstance(mask, str | Image.Image):
        check_picture(mask, term, "mask")
    elif not (isinstance(mask, list | tuple) and len(mask) == 4 and all(type(one) is int for one in mask)):
        raise UserError(f"{term}: mask must be a file, or left, top, width and height in pixels, not {mask!r}")
    elif min(mask) < 0 or not (mask[2] and mask[3]):
        raise UserError(f"{term}: mask needs a width and a height, and begins within the picture, not {list(mask)}")


def _differ(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the ratios of two widths and heights are more than 2 % apart."""
    across, down = size[0] * other[1], size[1] * other[0]
    return abs(across - down) > max(across, down) / 50


@torch.no_grad()
def latents_of(picture: Picture, point: Point, term: str, option: str = "picture") -> Tensor:
    """Scaled latents [1, c, h, w] of a picture, the mean, of the size of what is drawn; kept in the point's memory.

    Raises:
        UserError: the picture has another ratio of its sides, or cannot be read; or there is no model to encode it.
    """
    if f"latents of {option}" not in point.memory:
        model = point.run.modelled(term)
        pixels = 2 * to_tensor(np.array(fitted(picture, model.downsample, point.x.shape, term, option))) - 1
        found = model.encode(pixels[None].to(model.device), sample=False)
        point.memory[f"latents of {option}"] = found.to(point.x)
    found = point.memory[f"latents of {option}"]
    return found


def fitted(picture: Picture, downsample: int, shape: Sequence[int], term: str, option: str = "picture") -> Image.Image:
    """A picture in RGB, of the size that latents [..., h, w] decode to, each to so many pixels a side.

    Raises:
        UserError: the picture has another ratio of its sides, or cannot be read.
    """
    if isinstance(picture, str):
        shown = _numbered(picture, term, option) or pictures.read(_file(picture, term, option))
    else:
        shown = pictures.upright_rgb(picture)
    height, width = (side * downsample for side in shape[-2:])
    if _differ(shown.size, (width, height)):
        raise UserError(
            f"{term}: {option} has {shown.width}x{shown.height} pixels, which is another ratio than that of the "
            f"{width}x{height} that are drawn: crop it, or draw in its ratio"
        )
    return shown.resize((width, height), Image.Resampling.LANCZOS)


def mask_of(mask: Mask, point: Point, term: str) -> Tensor:
    """[1, 1, h, w] over the latents, 1 where any pixel of a latent is more than half white; kept in the memory.

    Raises:
        UserError: the mask is empty, has another ratio of its sides, or cannot be read; or it is a rectangle that does
            not fit, or there is no model.
    """
    if "mask" not in point.memory:
        point.memory["mask"] = white_of(mask, point.run, point.x.shape, term).to(point.x)
    found: Tensor = point.memory["mask"]
    return found


def white_of(mask: Mask, run: Run, shape: Sequence[int], term: str) -> Tensor:
    """`mask_of` for latents [..., h, w], float32 on the CPU."""
    if isinstance(mask, str | Image.Image):
        return _pooled(mask, shape, term)
    return _rectangle(mask, run.modelled(term).downsample, shape, term)


def _pooled(mask: Picture, shape: Sequence[int], term: str) -> Tensor:
    grey = pictures.read_mask(_file(mask, term, "mask")) if isinstance(mask, str) else pictures.mask(mask)
    rows, columns = shape[-2:]
    if _differ(grey.size, (columns, rows)):
        raise UserError(
            f"{term}: the mask has {grey.width}x{grey.height} pixels, which is another ratio than that of what is "
            "drawn: crop it, or draw in its ratio"
        )
    white = (to_tensor(np.array(grey)[..., None])[None] > 0.5).float()
    # Larger masks are pooled, smaller ones repeated; either way no pixel of the mask is lost.
    found = F.adaptive_max_pool2d(white, (rows, columns))
    if not found.any():
        raise UserError(f"{term}: the mask is black everywhere: paint white what it is to mark")
    return found


def _rectangle(mask: Sequence[int], side: int, shape: Sequence[int], term: str) -> Tensor:
    (rows, columns), (left, top, width, height) = shape[-2:], mask
    if left + width > columns * side or top + height > rows * side:
        raise UserError(f"{term}: mask {list(mask)} ends outside of the {columns * side}x{rows * side} that are drawn")
    found = torch.zeros(1, 1, rows, columns)
    found[..., top // side : -(-(top + height) // side), left // side : -(-(left + width) // side)] = 1
    return found


def _numbered(picture: str, term: str, option: str) -> Image.Image | None:
    try:
        return numbered.picture(picture)
    except UserError as error:
        raise UserError(f"{term}: {option} {error}") from error


def _file(picture: str, term: str, option: str) -> Path:
    return outside.expanded(Path(picture), f"{term}: {option}")
