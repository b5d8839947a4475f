"""Where the nouns of a caption are in its picture: a mask for each, all in one picture of bits.

Bit i of a pixel says that the i-th noun of the sample is there, so masks may overlap, and every row has one picture
however many nouns it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Bits of a signed number of 32.
MOST = 31


def packed(masks: Sequence[Image.Image]) -> Image.Image:
    """Grey masks, white where their noun is, as one picture of bits (mode ``I``).

    Raises:
        ValueError: more masks than bits, or of different sizes.
    """
    if len(masks) > MOST or len({mask.size for mask in masks}) > 1:
        raise ValueError(f"the nouns of a picture need masks of one size, {MOST} at most")
    layers = [(np.asarray(mask) > 127).astype(np.int32) << i for i, mask in enumerate(masks)]
    return Image.fromarray(reduce(np.bitwise_or, layers))


def empty(picture: Image.Image, nouns: Sequence[str]) -> list[str]:
    """The nouns that a picture of bits has nowhere."""
    there = int(np.bitwise_or.reduce(np.asarray(picture), axis=None))
    return [noun for i, noun in enumerate(nouns) if not there >> i & 1]


def to_latents(
    picture: Image.Image,
    size: tuple[int, int],
    downsample: int,
    *,
    flip: bool = False,
    centering: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """Crop bits as :func:`visiontune.data.transforms.to_pixels` crops their picture; a latent has those of its pixels.

    Args:
        picture: of bits. size: height and width in pixels, multiples of ``downsample``, pixels per latent pixel.
        flip, centering: as for the picture.

    Returns:
        ``int32 [1, h / downsample, w / downsample]``.
    """
    height, width = size
    fitted = ImageOps.fit(picture, (width, height), method=Image.Resampling.NEAREST, centering=centering)
    if flip:
        fitted = ImageOps.mirror(fitted)
    cells = np.asarray(fitted).reshape(height // downsample, downsample, width // downsample, downsample)
    return torch.from_numpy(np.bitwise_or.reduce(cells, axis=(1, 3)).astype(np.int32))[None]


def planes(bits: Tensor, count: int) -> Tensor:
    """Masks bool ``[count, h, w]`` of the first nouns, of bits ``[1, h, w]``."""
    shifts = torch.arange(count, device=bits.device, dtype=bits.dtype).view(-1, 1, 1)
    return (bits >> shifts & 1).bool()
