"""What stands beside prompts: pictures that a model reads, and the mask of one that it paints into."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from visiontune.data import buckets, canvas, pictures, transforms
from visiontune.errors import UserError
from visiontune.outside import expanded

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

_GREY = (128, 128, 128)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The pictures of one request, and a mask of the first one's shape, white where it is painted into.

    With ``canvas`` the first picture is one of two panels (:mod:`visiontune.data.canvas`).
    """

    pictures: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None
    canvas: bool = False

    def __bool__(self) -> bool:
        return bool(self.pictures)

    def options(self) -> dict[str, Any]:
        """As options of a `visiontune.core.Request`."""
        return {"pictures": self.pictures, "mask": self.mask}

    def seen(self) -> Image.Image:
        """The first picture, grey where it is painted into."""
        picture = self.pictures[0]
        if self.mask is None:
            return picture
        return Image.composite(Image.new("RGB", picture.size, _GREY), picture, self.mask.convert("L"))

    def fitted(self, model: PipelineModel, size: tuple[int, int]) -> Shown:
        """Cut to what is drawn, for models whose pictures are of its size: filling it, as rows of a run do.

        Args:
            size: height and width in pixels.
        """
        if not self or not model.reads.channels:
            return self
        shown = tuple(transforms.fitted(one, size) for one in self.pictures)
        mask = None if self.mask is None else ImageOps.fit(self.mask, size[::-1], Image.Resampling.NEAREST)
        return replace(self, pictures=shown, mask=mask)

    def on_canvas(self, size: tuple[int, int]) -> Shown:
        """The one picture on the left of a canvas that is painted into on the right.

        Args:
            size: height and width of a panel.
        """
        (picture,) = self.pictures
        return Shown(pictures=(canvas.blank(picture, size[::-1]),), mask=canvas.hole(size[::-1]), canvas=True)

    def pasted(self, picture: np.ndarray) -> np.ndarray:
        """What was drawn, ``uint8 [h, w, 3]``, where it was painted into, and the first picture's own pixels elsewhere.

        Args:
            picture: of the size of the pictures.
        """
        assert self.mask is not None
        over = self.mask.convert("L").point(lambda level: 255 * (level >= 128))
        return np.asarray(Image.composite(Image.fromarray(picture), self.pictures[0], over))


NOTHING = Shown()


def read(files: Sequence[str], mask: str | None = None) -> Shown:
    """The pictures of some files, upright and in RGB, and a mask.

    Raises:
        UserError: a file is missing or no picture, or the mask has no picture, another shape, or nothing white.
    """
    shown = tuple(pictures.read(expanded(file, "picture")) for file in files)
    if mask is None:
        return Shown(pictures=shown)
    if not shown:
        raise UserError(f"mask {mask} has no picture that it belongs to: name that too, in pictures")
    over = pictures.read_mask(expanded(mask, "mask"))
    if over.size != shown[0].size:
        sides = [f"{one.width}x{one.height}" for one in (over, shown[0])]
        raise UserError(f"mask {mask} is {sides[0]}, and its picture {files[0]} {sides[1]}: make it as large")
    if over.getbbox() is None:
        raise UserError(f"mask {mask} has no white pixel, so nothing would be painted: draw white where it shall be")
    return Shown(pictures=shown, mask=over)


def size_for(model: PipelineModel, shown: Shown) -> tuple[int, int]:
    """Height and width of what is drawn beside pictures where nobody says: the bucket whose shape is nearest to that of
    the first one, for models that draw into its place; the model's own for others."""
    if not shown or not model.reads.channels:
        return model.size()
    picture = shown.pictures[0]
    return buckets.nearest(
        (picture.height, picture.width), buckets.sizes(model.resolution, model.downsample, model.unit)
    )


def digests(files: Sequence[str]) -> list[str]:
    """Of the contents of files, by which a folder of pictures knows what it was drawn from."""
    return [hashlib.sha256(expanded(file, "picture").read_bytes()).hexdigest()[:16] for file in files]
