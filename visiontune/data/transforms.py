"""From a picture to the pixels that a VAE codes, and from a mask to its share in each of their latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import avg_pool2d

from visiontune.ops.pixels import to_tensor

RECIPE = "fit-lanczos-2"  # goes into cache keys: change it when the same picture would come out different


@dataclass(frozen=True, kw_only=True)
class Zoom:
    """A picture made ``factor`` times as large on its own canvas, its left and top side ``x`` and ``y`` pixels in."""

    factor: float
    x: float
    y: float

    def of(self, picture: Image.Image, resample: Image.Resampling) -> Image.Image:
        """The canvas, black where the picture does not reach."""
        back = 1 / self.factor
        affine = (back, 0, -self.x * back, 0, back, -self.y * back)
        return picture.transform(picture.size, Image.Transform.AFFINE, affine, resample)

    @staticmethod
    def draw(
        share: float, size: tuple[int, int], rng: torch.Generator, box: tuple[int, int, int, int] | None = None
    ) -> Zoom:
        """One of chance: factors between 1 - share and 1 + share, and any place, but that a box stays whole if it can.

        Args:
            size: height and width in pixels. rng: a CPU generator.
            box: left, top, width and height in pixels.
        """
        chance, *places = torch.rand(3, generator=rng).tolist()
        factor = 1 + share * (2 * chance - 1)
        left, top, width, height = box or (0, 0, 0, 0)
        spans = ((size[1], left, width), (size[0], top, height))
        x, y = (_start(factor, *span, place) for span, place in zip(spans, places, strict=True))
        return Zoom(factor=factor, x=x, y=y)


def _start(factor: float, side: int, first: int, length: int, place: float) -> float:
    """Where a zoomed side begins: on its canvas if it is smaller, beyond it if it is larger, what it holds in sight."""
    least, most = sorted((0.0, side * (1 - factor)))
    if length:
        # The part in sight ends behind the last pixel of what is to be seen, and begins before the first.
        least, most = max(least, -factor * first), min(most, side - factor * (first + length))
        if least > most:
            least = most = (least + most) / 2
    return least + place * (most - least)


def fitted(
    picture: Image.Image, size: tuple[int, int], *, flip: bool = False, centering: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """A picture resized until it covers ``size`` and cropped; arguments as of :func:`to_pixels`."""
    height, width = size
    found = ImageOps.fit(picture, (width, height), method=Image.Resampling.LANCZOS, centering=centering)
    return ImageOps.mirror(found) if flip else found


def to_pixels(
    picture: Image.Image,
    size: tuple[int, int],
    *,
    flip: bool = False,
    centering: tuple[float, float] = (0.5, 0.5),
    zoom: Zoom | None = None,
) -> torch.Tensor:
    """Resize until the picture covers ``size``, crop the overhang, and scale to [-1, 1].

    Args:
        picture: an RGB picture.
        size: height and width in pixels.
        flip: mirror left to right.
        centering: where the crop lies across and down, each in [0, 1]; (0.5, 0.5) is the middle.
        zoom: of the crop; black where nothing of it is left.

    Returns:
        ``float32 [3, h, w]`` in [-1, 1].
    """
    found = fitted(picture, size, flip=flip, centering=centering)
    if zoom is not None:
        found = zoom.of(found, Image.Resampling.BICUBIC)
    return to_tensor(np.array(found)) * 2 - 1


def to_mask(
    picture: Image.Image,
    size: tuple[int, int],
    downsample: int,
    *,
    flip: bool = False,
    centering: tuple[float, float] = (0.5, 0.5),
    zoom: Zoom | None = None,
) -> torch.Tensor:
    """Crop a grey mask as :func:`to_pixels` crops its picture, and average it over the pixels of each latent.

    Args:
        picture: a grey mask, white where something counts.
        size: height and width in pixels, multiples of ``downsample``.
        downsample: pixels per latent pixel.
        flip, centering, zoom: as for the picture.

    Returns:
        ``float32 [1, h / downsample, w / downsample]`` in [0, 1].
    """
    height, width = size
    # In real numbers, since a mean of grey levels is none; and by a filter that, unlike the pictures', does not ring.
    fitted = ImageOps.fit(picture.convert("F"), (width, height), method=Image.Resampling.BILINEAR, centering=centering)
    if flip:
        fitted = ImageOps.mirror(fitted)
    if zoom is not None:
        fitted = zoom.of(fitted, Image.Resampling.BILINEAR)
    levels = torch.from_numpy(np.array(fitted, np.float32))[None]
    return avg_pool2d(levels, downsample) / 255


def box_of(region: torch.Tensor) -> tuple[int, int, int, int]:
    """The least box that holds a region ``[1, h, w]``: left, top, width and height in pixels.

    Raises:
        ValueError: nothing of it is above 0.
    """
    sides = [torch.nonzero(region[0].amax(axis)).flatten() for axis in (0, 1)]
    if not len(sides[0]):
        raise ValueError("an empty region has no box")
    (left, width), (top, height) = ((int(at[0]), int(at[-1] - at[0]) + 1) for at in sides)
    return left, top, width, height


def boxed(region: torch.Tensor, jitter: float = 0.0, rng: torch.Generator | None = None) -> torch.Tensor:
    """The least box that holds a region ``[1, h, w]``, 0 or 1, each side moved outwards by chance.

    Args:
        jitter: how far at most, in sides of the box. rng: a CPU generator, for a jitter.

    Raises:
        ValueError: the region is empty.
    """
    left, top, width, height = box_of(region)
    moves = torch.rand(4, generator=rng).tolist() if jitter else [0.0] * 4
    before, after = ((round(jitter * width * moves[i]), round(jitter * height * moves[i + 1])) for i in (0, 2))
    found = torch.zeros_like(region)
    rows = slice(max(0, top - before[1]), top + height + after[1])
    found[:, rows, max(0, left - before[0]) : left + width + after[0]] = 1
    return found


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
