"""Aspect-ratio buckets: sizes of one area, so that images keep their shape and still stack into batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from visiontune.errors import UserError

Size = tuple[int, int]  # height, width
MAX_ASPECT = 2.0


def sizes(resolution: int, downsample: int, unit: int = 1, *, square: bool = False) -> list[Size]:
    """Bucket sizes (height, width) for a pixel budget of ``resolution ** 2``, the square first.

    But for the square, which is as asked, sides are multiples of eight latent pixels (a denoiser halves them three
    times at most). No bucket is larger than the budget, so memory is that of the square, and none is longer than 2:1.

    Args:
        resolution: side of the square, in pixels.
        downsample: pixels per latent pixel.
        unit: what else the sides of a picture are multiples of.
        square: the square alone.

    Raises:
        UserError: the resolution is not a positive multiple of ``downsample`` and ``unit``.
    """
    least = math.lcm(downsample, unit)
    if resolution <= 0 or resolution % least:
        near = max(round(resolution / least), 1) * least
        raise UserError(f"data.resolution {resolution} is no multiple of {least}: take {near}")
    found = [(resolution, resolution)]
    if square:
        return found
    step = math.lcm(8 * downsample, unit)
    for short in range(step, resolution, step):
        long = resolution**2 // short // step * step
        if short < long <= MAX_ASPECT * short:
            found += [(short, long), (long, short)]
    return found


def nearest(size: Size, choices: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of ``size``, measured as a ratio of ratios."""
    aspect = math.log(size[0] / size[1])
    return min(choices, key=lambda c: abs(math.log(c[0] / c[1]) - aspect))
