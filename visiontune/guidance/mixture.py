"""Mixture of Diffusers: a canvas of regions, each with a prompt of its own, or a large one of tiles.

Barbero Jimenez, 2023, arXiv 2302.02412: the latents of every region R_k are predicted by themselves, and
e = sum_k m_k w_k e_k / sum_k m_k w_k. The sampler makes one step of the whole canvas. w_k falls from the middle of a
region to its edges, so that no seam is seen where regions overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.errors import UserError
from visiontune.guidance._regions import Cells, Region, Weights, falling, tiles
from visiontune.guidance.base import Canvas, Part, Point, Run, Sides
from visiontune.schema import option

# Of the prompt and of the negative prompt.
_Texts = tuple[Condition | None, Condition | None]


@dataclass(frozen=True, kw_only=True)
class Config(Canvas):
    """Regions, tiles and a background, in any combination that leaves nothing uncovered."""

    scale: float = option(1.0, least=0, greatest=1, help="1: the canvas is made of regions; 0: it is not")
    regions: list[Region] = option(
        [],
        help="{box: [left, top, width, height], prompt: ...} of each, with negative, scale and weight if they differ",
    )
    tile: int | None = option(
        None,
        least=8,
        greatest=16384,
        help="side in pixels of tiles that cover the canvas with the picture's own prompt",
    )
    overlap: int | None = option(None, least=0, greatest=16384, help="of tiles, in pixels; null for half a tile")
    background: float = option(
        0.0, least=0, greatest=1e6, help="weight of the whole canvas with the picture's own prompt; 0 for none"
    )
    weights: Weights = option("gaussian", help="how a region's weight falls from its middle to its edges")
    crops: bool = option(
        False, help="networks that are told sizes (SDXL) are told that regions are cut out of the canvas"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in (0, 1) or self.schedule != "constant":
            raise UserError("a canvas is made of regions or it is not: scale is 1 or 0, and schedule constant")
        if not self.regions and self.tile is None and not self.background:
            raise UserError("mixture has nothing to mix: give regions, tile or background")
        if self.overlap is not None and self.overlap >= (self.tile or 0):
            raise UserError(f"overlap {self.overlap} must be smaller than tile, which is {self.tile or 'null'}")

    def begins(self, run: Run) -> None:
        model = run.modelled(self.name)
        if not run.shape:
            return
        width, height = _size(run)
        canvas = f"the canvas of {width}x{height} pixels"
        for region in self._all(run):
            where, (left, top, wide, high) = f"mixture: region {list(region.box)}", region.box
            if any(value % model.unit for value in region.box):
                raise UserError(f"{where} is off the grid of '{model.source}': take multiples of {model.unit}")
            if left + wide > width or top + high > height:
                raise UserError(f"{where} reaches out of {canvas}: make it smaller, or the picture larger")
        bare = (self._shares(run)[0] == 0).nonzero()
        if len(bare):
            row, column = (int(cell) * model.downsample for cell in bare[0])
            raise UserError(
                f"mixture: no region covers {canvas} at [{column}, {row}]: add one there, or tile, or background"
            )

    def scales(self, run: Run) -> Sequence[float | None]:
        return [region.scale for region in self._all(run)]

    def parts(self, sides: Sides, point: Point) -> Sequence[Part]:
        own, regions = sides.conditions(), self._all(point.run)
        if own[0].references is not None or "channels" in own[0].extra:
            raise UserError("mixture has no place for pictures beside the prompt: leave them out")
        if "texts" not in point.memory:
            self.begins(point.run)
            point.memory["texts"] = [_read(region, own, point.run.model) for region in regions]
        return [
            self._part(region, texts, own, point) for region, texts in zip(regions, point.memory["texts"], strict=True)
        ]

    def blend(self, predictions: Sequence[Tensor], point: Point) -> Tensor:
        found = torch.zeros_like(point.x, dtype=predictions[0].dtype)
        if "shares" not in point.memory:
            # Corners of a Gaussian are nothing in low precision: only what they are of the sum is rounded to it.
            total, parts = self._shares(point.run)
            point.memory["shares"] = [(cells, (weight / total[cells]).to(found)) for cells, weight in parts]
        for (cells, share), prediction in zip(point.memory["shares"], predictions, strict=True):
            found[(..., *cells)] += share * prediction
        return found

    def _all(self, run: Run) -> list[Region]:
        """Background, tiles and regions; the regions alone where the size of the canvas is not known."""
        if not run.shape:
            return list(self.regions)
        width, height = _size(run)
        found = [Region(box=(0, 0, width, height), weight=self.background)] if self.background else []
        if self.tile is not None:
            half, unit = self.tile // 2, run.model.unit
            found += tiles(self.tile, half // unit * unit if self.overlap is None else self.overlap, width, height)
        return [*found, *self.regions]

    def _shares(self, run: Run) -> tuple[Tensor, list[tuple[Cells, Tensor]]]:
        """The sum [h, w] of all weights, float64, and of each region its latents and their weights."""
        total, found = torch.zeros(*run.shape[-2:], dtype=torch.float64), []
        for number, region in enumerate(self._all(run)):
            cells = region.cells(run.model)
            kind: Weights = "constant" if self.background and number == 0 else self.weights
            found.append((cells, region.weight * falling(kind, cells)))
            total[cells] += found[-1][1]
        return total, found

    def _part(self, region: Region, texts: _Texts, own: _Texts, point: Point) -> Part:
        model, rows, size = point.run.model, len(point.x), _size(point.run)

        def told(text: Condition | None, mine: Condition | None) -> Condition | None:
            if text is not None:
                text = text[torch.zeros(rows, dtype=torch.long)]
                mine = replace(text, extra={**({} if mine is None else mine.extra), **text.extra})
            if mine is None or region.box == (0, 0, *size):
                return mine
            return model.placed(mine, region.box, size[::-1] if self.crops else None)

        (cond, uncond), (down, across) = map(told, texts, own), region.cells(model)
        assert cond is not None
        place = (down.start, across.start)
        return Part(x=point.x[..., down, across], cond=cond, uncond=uncond, place=place, prompt=region.prompt)


def _size(run: Run) -> tuple[int, int]:
    """Width and height of the canvas in pixels."""
    height, width = (side * run.model.downsample for side in run.shape[-2:])
    return width, height


@torch.no_grad()
def _read(region: Region, own: _Texts, model: Any) -> _Texts:
    """One row each of the region's prompts, which are constants; None for those that are the picture's own."""
    cond = None if region.prompt is None else model.embed([region.prompt])
    if region.negative is not None:
        return cond, model.embed([region.negative], negative=True)
    # Where the base acts in a region alone, nobody has read a negative prompt.
    alone = own[1] is None and region.scale is not None
    return cond, model.unconditional(1) if alone else None


def build(config: Config) -> Config:
    """The term."""
    return config
