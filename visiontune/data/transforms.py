"""From a picture to the pixels that a VAE codes, and from a mask to its share in each of their latents."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import avg_pool2d

from visiontune.ops.pixels import to_tensor

RECIPE = "fit-lanczos-2"  # goes into cache keys: change it when the same picture would come out different


def fitted(
    picture: Image.Image, size: tuple[int, int], *, flip: bool = False, centering: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """A picture resized until it covers ``size`` and cropped; arguments as of :func:`to_pixels`."""
    height, width = size
    found = ImageOps.fit(picture, (width, height), method=Image.Resampling.LANCZOS, centering=centering)
    return ImageOps.mirror(found) if flip else found


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
    return to_tensor(np.array(fitted(picture, size, flip=flip, centering=centering))) * 2 - 1


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


def random_region(size: tuple[int, int], rng: torch.Generator) -> torch.Tensor:
    """Where a model is to paint that was told nothing: one to three rectangles, or one time in four everywhere.

    Sides are uniform between an eighth and five eighths of the picture's.

    Args:
        size: height and width in pixels. rng: a CPU generator.

    Returns:
        ``float32 [1, h, w]``, 0 or 1.
    """
    region = torch.zeros(1, *size)
    everywhere, count = torch.rand(2, generator=rng).tolist()
    if everywhere < 0.25:
        return region + 1
    for _ in range(1 + int(3 * count)):
        shares = torch.rand(2, 2, generator=rng).tolist()
        spans = []
        for side, (long, begin) in zip(size, shares, strict=True):
            length = max(1, round(side * (0.125 + 0.5 * long)))
            first = round((side - length) * begin)
            spans.append(slice(first, first + length))
        region[:, spans[0], spans[1]] = 1
    return region
