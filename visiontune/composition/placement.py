"""Where an object goes: boxes on a grid of centres and sizes, scored by whoever can judge a composite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from visiontune.composition.blending import paste
from visiontune.composition.layer import Box, Layer
from visiontune.errors import UserError

# (composite [h, w, 3], mask [h, w]) -> how good it is; a reward, a CLIP, a model of language.
Scorer = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A box and its score."""

    box: Box
    score: float


def places(
    picture: np.ndarray,
    mask: np.ndarray,
    canvas: np.ndarray,
    scorer: Scorer,
    *,
    grid: int = 16,
    scales: Sequence[float] = (0.2, 0.35, 0.5, 0.65, 0.8),
    best: int = 3,
    overlap: float = 0.5,
) -> list[Place]:
    """The best boxes for an object, the best first; of equal ones the one tried first: small ones first, from the top.

    Args:
        picture: [h, w, 3] the object. mask: [h, w], where it is. canvas: [H, W, 3].
        scorer: judges the object pasted onto the canvas.
        grid: centres along each side. scales: longer side of the object over the canvas' shorter one.
        best: how many. overlap: boxes that share more (of their union) with a better one are left out.

    Raises:
        UserError: no box of these sizes lies within the canvas.
    """
    tried = []
    for box in boxes(picture.shape[:2], canvas.shape[:2], grid, scales):
        layer = Layer.of(picture, mask, canvas, box)
        tried.append(Place(box=box, score=float(scorer(paste(layer, canvas), layer.mask))))
    if not tried:
        raise UserError("no box of these scales lies within the canvas: take smaller ones")
    return suppress(tried, overlap)[:best]


def boxes(shape: tuple[int, ...], canvas: tuple[int, ...], grid: int, scales: Sequence[float]) -> list[Box]:
    """All boxes of the object's ratio that lie within the canvas, in the order in which they are tried."""
    found = []
    for scale in scales:
        factor = scale * min(canvas) / max(shape)
        height, width = (max(round(side * factor), 1) for side in shape)
        for y in (np.arange(grid) + 0.5) * canvas[0] / grid:
            for x in (np.arange(grid) + 0.5) * canvas[1] / grid:
                left, top = round(x - width / 2), round(y - height / 2)
                if left >= 0 and top >= 0 and left + width <= canvas[1] and top + height <= canvas[0]:
                    found.append((left, top, left + width, top + height))
    return list(dict.fromkeys(found))


def suppress(tried: Sequence[Place], overlap: float) -> list[Place]:
    """The places by their score, without those that share more than `overlap` of their union with a better one."""
    kept: list[Place] = []
    for place in sorted(tried, key=lambda one: -one.score):
        if all(_shared(place.box, better.box) <= overlap for better in kept):
            kept.append(place)
    return kept


def _shared(one: Box, other: Box) -> float:
    wide = max(min(one[2], other[2]) - max(one[0], other[0]), 0)
    high = max(min(one[3], other[3]) - max(one[1], other[1]), 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return wide * high / (areas - wide * high)
