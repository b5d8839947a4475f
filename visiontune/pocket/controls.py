"""Pictures that control drawings of the pocket world, made of a picture of it, and whether a drawing follows them.

Both are black where they say nothing: `sketch` is the outlines of the objects without their colours, `colors` their
colours without their outlines.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from visiontune.pocket.oracle import Found, colored, read
from visiontune.pocket.world import SIZE, Scene, Thing, coverage

CELL = 8  # pixels a side, within which a map of colours has one
LEAST_SHARE = 0.25  # of a cell that objects cover, where the map has a colour
LEAST_OVERLAP = 0.5


def sketch(picture: np.ndarray) -> np.ndarray:
    """Outlines of the objects, two pixels wide and white on black: uint8 [64, 64, 3] of a picture of that shape."""
    objects = colored(picture)
    edge = ndimage.binary_dilation(objects) ^ ndimage.binary_erosion(objects)
    return np.repeat(np.where(edge, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)


def colors(picture: np.ndarray) -> np.ndarray:
    """The mean colour of the objects in each cell, black where there are none: uint8 [64, 64, 3]."""
    objects = colored(picture).astype(np.float32)[..., None]
    share, paint = _pooled(objects), _pooled(picture * objects)
    cells = np.where(share >= LEAST_SHARE, paint / share.clip(1e-6), 0)
    return cells.round().astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)


MAPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"sketch": sketch, "colors": colors}


def followed(picture: np.ndarray, scene: Scene) -> dict[str, float]:
    """Shares of a scene's objects that a picture has in their place: with their `shape`, their `color`, and `both`."""
    found = read(picture)
    there = [(thing, _standing(found, thing)) for thing in scene.things]
    hits = [(one is not None and one.thing.shape == t.shape, one is not None and one.thing.color == t.color)
            for t, one in there]  # fmt: skip
    shape, color = np.mean(hits, axis=0)
    return {"shape": float(shape), "color": float(color), "both": float(np.mean([all(hit) for hit in hits]))}


def _standing(found: list[Found], thing: Thing) -> Found | None:
    """The object that covers the place of a thing, and little else."""
    place = coverage(thing.shape, thing.x, thing.y, thing.radius) > 0.5
    overlaps = [float((one.mask & place).sum() / (one.mask | place).sum()) for one in found]
    best = max(overlaps, default=0.0)
    return found[overlaps.index(best)] if best >= LEAST_OVERLAP else None


def _pooled(image: np.ndarray) -> np.ndarray:
    cells = SIZE // CELL
    means: np.ndarray = image.reshape(cells, CELL, cells, CELL, -1).mean((1, 3))
    return means
