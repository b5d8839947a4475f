"""From a picture to the pixels that a VAE codes, and from a mask to its share in each of their latents."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import avg_pool2d

from visiontune.ops.pixels import to_tensor

RECIPE = "fit-lanczos-2"  # goes into cache keys: change it when the same picture would come out different


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


def to_mask(
    picture: Image.Image,
    size: tuple[int, int],
    downsample: int,
    *,
    flip: bool = False,
    centering: tuple[float, float] = (0.5, 0.5),
) -> torch.Tensor:
    """Crop a grey mask as :func:`to_pixels` crops its picture, and average it over the pixels of each latent.

    Args:
        picture: a grey mask, white where something counts.
        size: height and width in pixels, multiples of ``downsample``.
        downsample: pixels per latent pixel.
        flip, centering: as for the picture.

    Returns:
        ``float32 [1, h / downsample, w / downsample]`` in [0, 1].
    """
    height, width = size
    # In real numbers, since a mean of grey levels is none; and by a filter that, unlike the pictures', does not ring.
    fitted = ImageOps.fit(picture.convert("F"), (width, height), method=Image.Resampling.BILINEAR, centering=centering)
    if flip:
        fitted = ImageOps.mirror(fitted)
    levels = torch.from_numpy(np.array(fitted, np.float32))[None]
    return avg_pool2d(levels, downsample) / 255
