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
from visiontune.data import pictures
from visiontune.errors import UserError
from visiontune.guidance.base import Point
from visiontune.ops.pixels import to_tensor

Picture = str | Image.Image


def check_picture(picture: Any, term: str, option: str = "picture") -> None:
    """Refuse what is no picture, before a model is opened: UserError naming the term and the option."""
    if isinstance(picture, str):
        pictures.size(_file(picture, term, option))
    elif not isinstance(picture, Image.Image):
        raise UserError(f"{term}: {option} must be a file, or a picture of Pillow, not {picture!r}")


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
    shown = pictures.read(_file(picture, term, option)) if isinstance(picture, str) else pictures.upright_rgb(picture)
    height, width = (side * downsample for side in shape[-2:])
    if abs(shown.width * height - shown.height * width) > max(shown.width * height, shown.height * width) / 50:
        raise UserError(
            f"{term}: {option} has {shown.width}x{shown.height} pixels, which is another ratio than that of the "
            f"{width}x{height} that are drawn: crop it, or draw in its ratio"
        )
    return shown.resize((width, height), Image.Resampling.LANCZOS)


def mask_of(mask: Picture, point: Point, term: str) -> Tensor:
    """[1, 1, h, w] over the latents, 1 where any pixel of a latent is more than half white; kept in the memory.

    Raises:
        UserError: the mask is empty, or cannot be read.
    """
    if "mask" not in point.memory:
        grey = pictures.read_mask(_file(mask, term, "mask")) if isinstance(mask, str) else pictures.mask(mask)
        white = (to_tensor(np.array(grey)[..., None])[None] > 0.5).to(point.x)
        # Larger masks are pooled, smaller ones repeated; either way no pixel of the mask is lost.
        height, width = point.x.shape[-2:]
        found = F.adaptive_max_pool2d(white, (height, width))
        if not found.any():
            raise UserError(f"{term}: the mask is black everywhere: paint white what is to be drawn anew")
        point.memory["mask"] = found
    found = point.memory["mask"]
    return found


def _file(picture: str, term: str, option: str) -> Path:
    return outside.expanded(Path(picture), f"{term}: {option}")
