"""Regions of a canvas: where they lie, what they are told, and how much each of their latents counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.models.diffusion import Box
from visiontune.schema import option

Weights = Literal["gaussian", "quartic", "constant"]
# Rows and columns of latents.
Cells = tuple[slice, slice]
_VARIANCE = 0.01  # of the Gaussian, in sides of the region
_REACH = 0.995  # of the quartic, which is 0 at 1


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the canvas.

    Attributes:
        box: left, top, width and height in pixels.
    """

    SHORTHAND: ClassVar[str] = "box"

    box: Box = option(least=0, greatest=1_000_000, help="left, top, width and height in pixels")
    prompt: str | None = option(None, help="what it shows; null for the picture's own prompt")
    negative: str | None = option(None, help="what it is guided away from; null for the picture's own negative prompt")
    scale: float | None = option(None, least=-1000, greatest=1000, help="of the base in it; null for the base's own")
    weight: float = option(1.0, above=0, greatest=1e6, help="m, how much it counts where regions overlap")

    def __post_init__(self) -> None:
        if not (self.box[2] and self.box[3]):
            raise UserError(f"a region needs a width and a height, not {list(self.box)}")

    def cells(self, model: Any) -> Cells:
        """Its latents."""
        left, top, width, height = (value // model.downsample for value in self.box)
        return slice(top, top + height), slice(left, left + width)


def tiles(tile: int, overlap: int, width: int, height: int) -> list[Region]:
    """Regions of one size, row by row, that cover a canvas; the last ones end where it does."""
    columns, rows = (_starts(side, tile, tile - overlap) for side in (width, height))
    return [Region(box=(left, top, min(tile, width), min(tile, height))) for top in rows for left in columns]


def _starts(side: int, tile: int, stride: int) -> list[int]:
    last = max(side - tile, 0)
    return [*range(0, last, stride), last]


def falling(kind: Weights, cells: Cells) -> Tensor:
    """[h, w] float64, how much each of the latents of a region counts by its distance from the middle."""
    down, across = (_profile(kind, cell.stop - cell.start) for cell in cells)
    return torch.outer(down, across)


def _profile(kind: Weights, count: int) -> Tensor:
    if kind == "constant":
        return torch.ones(count, dtype=torch.float64)
    if kind == "quartic":
        return 15 / 16 * (1 - torch.linspace(-_REACH, _REACH, count, dtype=torch.float64).square()).square()
    place = torch.arange(count, dtype=torch.float64) - (count - 1) / 2
    return (-(place / count).square() / (2 * _VARIANCE)).exp()
