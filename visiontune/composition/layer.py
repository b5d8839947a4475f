"""What is composed: pictures and masks as arrays, and an object put onto a canvas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from visiontune.data import pictures
from visiontune.errors import UserError

Box = tuple[int, int, int, int]


def as_picture(picture: Image.Image) -> np.ndarray:
    """float64 [h, w, 3] in [0, 1], upright and flattened on white."""
    return np.asarray(pictures.upright_rgb(picture), dtype=np.float64) / 255


def as_mask(mask: Image.Image) -> np.ndarray:
    """float64 [h, w] in [0, 1], 1 where the mask is white; soft edges stay soft."""
    return np.asarray(pictures.mask(mask), dtype=np.float64) / 255


def as_pillow(values: np.ndarray) -> Image.Image:
    """A picture or a mask of eight bits; what is outside of [0, 1] is cut off."""
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """An object on a canvas.

    Attributes:
        picture: [h, w, 3] of the canvas' size: what was put into the box, black outside of it.
        mask: [h, w], the object. box: where it was put.
    """

    picture: np.ndarray
    mask: np.ndarray
    box: Box

    @staticmethod
    def of(picture: np.ndarray, mask: np.ndarray, canvas: np.ndarray, box: Box) -> Layer:
        """An object resized into a box of a canvas.

        Args:
            picture: [h, w, 3]. mask: [h, w], the object in it. canvas: [H, W, 3]. box: within the canvas.

        Raises:
            UserError: the sizes do not go together, the box leaves the canvas, or the mask is empty.
        """
        height, width = canvas.shape[:2]
        left, top, right, bottom = box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise UserError(
                f"box {list(box)} must be left, top, right, bottom within the {width}x{height} pixels of the canvas"
            )
        if mask.shape != picture.shape[:2]:
            raise UserError(
                f"the mask has {mask.shape[1]}x{mask.shape[0]} pixels and its picture "
                f"{picture.shape[1]}x{picture.shape[0]}: take a mask of the picture's size"
            )
        if not mask.any():
            raise UserError("the mask is black everywhere: paint the object white")
        size = (right - left, bottom - top)
        whole, placed = np.zeros_like(canvas), np.zeros((height, width))
        # Colours beside the object must not bleed into its edge, so there what is resized is the object alone.
        weight = _resized(mask, size)
        for channel in range(3):
            own = _resized(picture[..., channel] * mask, size)
            around = _resized(picture[..., channel], size)
            whole[top:bottom, left:right, channel] = np.divide(own, weight, out=around, where=weight > 0)
        placed[top:bottom, left:right] = weight.clip(0, 1)
        return Layer(picture=whole.clip(0, 1), mask=placed, box=box)


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w] at another width and height; the values as they are where the size is theirs."""
    if values.shape == size[::-1]:
        return values.copy()
    grey = Image.fromarray(values.astype(np.float32))
    return np.asarray(grey.resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
