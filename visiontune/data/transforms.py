"""From a picture file to the pixels that a VAE codes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps

from visiontune.ops.pixels import to_tensor

RECIPE = "fit-lanczos-1"  # goes into cache keys: change it when the same picture would come out different


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Decode a picture, turn it as its EXIF orientation says, flatten transparency on white, convert to RGB.

    Sixteen-bit greys are scaled to eight bits (a plain conversion would clip them to white).
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def to_pixels(
    picture: Image.Image, size: tuple[int, int], *, flip: bool = False, centering: tuple[float, float] = (0.5, 0.5)
) -> torch.Tensor:
    """Resize until the picture covers ``size``, crop the overhang, and scale to [-1, 1].

    Args:
        picture: an RGB picture.
        size: height and width in pixels.
        flip: mirror left to right.
        centering: where the crop lies across and down, each in [0, 1]; (0.5, 0.5) is the middle.

    Returns:
        ``float32 [3, h, w]`` in [-1, 1].
    """
    height, width = size
    fitted = ImageOps.fit(picture, (width, height), method=Image.Resampling.LANCZOS, centering=centering)
    if flip:
        fitted = ImageOps.mirror(fitted)
    return to_tensor(np.array(fitted)) * 2 - 1
