"""Multi-view reconstruction consistency (MRC): do the views in an image show one and the same object?

Xie et al., "Carve3D: Improving Multi-view Reconstruction Consistency for Diffusion Models with RL Finetuning", CVPR
2024, section 3. A frozen network of yours reconstructs the object from the views and renders it from their cameras.
Each view and its render are cut to the object's box and brought to one size, so that drawing it smaller gains nothing,
and compared; the score is minus the mean distance. Views without an object would be perfectly consistent: they get
``worst``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from visiontune import plugin
from visiontune.errors import UserError
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of MRC."""

    reconstruct: str | dict[str, Any] | None = option(
        None, help="your .py file, or {name: file, **options}: its build(config) returns the function that renders"
    )
    rows: int = option(2, least=1, greatest=64, help="rows of views in an image")
    columns: int = option(2, least=1, greatest=64, help="views in a row")
    background: float = option(
        0.95, least=0, greatest=1, help="a pixel of the object has a channel below this; the ground is white"
    )
    margin: int = option(5, least=0, greatest=16384, help="pixels of ground kept around the object's box")
    least: float = option(0.01, least=0, greatest=1, help="share of a view that the object must fill")
    worst: float = option(-1.0, least=-1e9, greatest=0, help="score where it does not, in any view")


def build(config: Config) -> Mrc:
    """The reward of a config; builds the user's function, which takes ``views [b, v, 3, h, w]`` in [0, 1] and ``meta``.

    It returns renders of that shape, and may have an attribute ``distance``, a function of two ``[n, 3, h, w]`` that
    returns ``[n]``, such as LPIPS; without one it is the mean squared difference.
    """
    if config.reconstruct is None:
        raise UserError("MRC needs the network that reconstructs: set reconstruct: FILE.py")
    module, own = plugin.configure("rewards", config.reconstruct, "reconstruct")
    return Mrc(config, plugin.build(module, own, "reconstruct"))


class Mrc(Reward):
    """At most 0; no gradient. Views are read row by row."""

    name = "mrc"
    range: tuple[float, float] = (float("-inf"), 0.0)

    def __init__(self, config: Config, reconstruct: Callable[[Tensor, Meta], Tensor]) -> None:
        self.config, self.reconstruct = config, reconstruct
        self.distance = getattr(reconstruct, "distance", _squared)

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        views = self._views(images)
        with plugin.guarded(self.reconstruct, "reconstruct(views, meta)"):
            renders = self.reconstruct(views.clone(), meta)
        if not isinstance(renders, Tensor) or renders.shape != views.shape:
            found = list(renders.shape) if isinstance(renders, Tensor) else f"a {type(renders).__name__}"
            raise UserError(f"reconstruct returned {found} for views {list(views.shape)}")
        objects = (views < self.config.background).any(2)
        scores = [self._consistency(*parts) for parts in zip(views, renders, objects, strict=True)]
        return torch.stack(scores)

    def _views(self, images: Tensor) -> Tensor:
        rows, columns = self.config.rows, self.config.columns
        height, width = images.shape[-2:]
        if height % rows or width % columns:
            raise UserError(f"images of {width}x{height} pixels do not hold {columns}x{rows} views of one size")
        grid = images.unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1))
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)

    def _consistency(self, views: Tensor, renders: Tensor, objects: Tensor) -> Tensor:
        """The score ``[]`` of v views ``[v, 3, h, w]`` with objects ``[v, h, w]``."""
        if objects.float().mean((1, 2)).min() < self.config.least:
            return views.new_tensor(self.config.worst)
        pairs = []
        for view, render, inside in zip(views, renders, objects, strict=True):
            box, size = square_box(inside, self.config.margin), list(views.shape[-2:])
            pairs.append(
                [resized_crop(x, *box, size, InterpolationMode.BICUBIC, antialias=True) for x in (view, render)]
            )
        one, other = (torch.stack(half) for half in zip(*pairs, strict=True))
        with plugin.guarded(self.distance, "the distance of reconstruct"):
            return -self.distance(one, other).mean()


def square_box(inside: Tensor, margin: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the square around the true pixels of ``[h, w]`` and a margin, cut at the edges."""
    left, top, right, bottom = (int(edge) for edge in masks_to_boxes(inside[None])[0])
    # The last pixel belongs to the object.
    spans = [(top, bottom + 1), (left, right + 1)]
    side = max(end - start for start, end in spans)
    corners = [start - (side - (end - start)) // 2 for start, end in spans]
    first = [max(corner - margin, 0) for corner in corners]
    last = [min(corner + side + margin, size) for corner, size in zip(corners, inside.shape, strict=True)]
    return first[0], first[1], last[0] - first[0], last[1] - first[1]


def _squared(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().flatten(1).mean(1)
