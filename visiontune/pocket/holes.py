"""Scenes of the pocket world with a hole, what is to be painted into it, and a judge that reads what was.

A hole is a box of pixels. What is asked for is the whole scene, or the thing in the box alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from visiontune.pocket.oracle import Found, Wanted, fits, read
from visiontune.pocket.scenes import caption, held_out, patterned, sample_scene
from visiontune.pocket.world import SIZE, Scene, Thing, coverage

# left, top, width and height in pixels
Box = tuple[int, int, int, int]
Kind = Literal["thing", "place", "all"]
# Of an object's pixels, the share that must lie in the box for it to stand there.
INSIDE = 0.95
_SHARES: dict[Kind, float] = {"thing": 0.7, "place": 0.2, "all": 0.1}
_SCENES = {"one": 0.4, "two": 0.4, "three": 0.2}
_PATTERNS = 0.35
# Pixels between a thing and each side of its box.
_LEAST, _MOST = 1, 6


@dataclass(frozen=True, kw_only=True)
class Hole:
    """A scene of which a box is hidden.

    Attributes:
        scene: as it is when the hole is filled. box: what is hidden.
        prompt: what is asked for. thing: what stands in the box, if it is one thing's.
    """

    scene: Scene
    box: Box
    prompt: str
    thing: Thing | None = None


def mask_of(box: Box) -> np.ndarray:
    """Where a box is, bool ``[64, 64]``."""
    left, top, width, height = box
    mask = np.zeros((SIZE, SIZE), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def box_around(thing: Thing, rng: np.random.Generator) -> Box:
    """A box that holds a thing, each side a few pixels from it."""
    mask = coverage(thing.shape, thing.x, thing.y, thing.radius) > 0
    sides = []
    for axis in (0, 1):
        there = np.flatnonzero(mask.any(axis))
        first = max(0, int(there[0]) - int(rng.integers(_LEAST, _MOST + 1)))
        last = min(SIZE, int(there[-1]) + 1 + int(rng.integers(_LEAST, _MOST + 1)))
        sides.append((first, last - first))
    (left, width), (top, height) = sides
    return left, top, width, height


# ---------------------------------------------------------------------------------------------------- judging


def standing(picture: np.ndarray, box: Box) -> list[Found]:
    """The objects of a picture ``uint8 [64, 64, 3]`` that lie in a box, but for a few of their pixels."""
    mask = mask_of(box)
    return [one for one in read(picture) if (one.mask & mask).sum() >= INSIDE * one.mask.sum()]


def filled(picture: np.ndarray, hole: Hole) -> bool:
    """Whether a picture has in the box the thing that was there, by its shape and colours, and no other object.

    Raises:
        ValueError: no thing was there.
    """
    thing = hole.thing
    if thing is None:
        raise ValueError("a hole without a thing of its own has no single right filling")
    there = standing(picture, hole.box)
    wanted = Wanted(shape=thing.shape, color=thing.color, accent=thing.accent or None)
    return len(there) == 1 and fits(there[0], wanted)


# ---------------------------------------------------------------------------------------------------- drawing


def stream(seed: int, kinds: Sequence[Kind] = (), holdout: bool = False, patterns: float = _PATTERNS) -> Iterator[Hole]:
    """Endless holes: those that are trained on, or the one in ten whose prompt never is.

    Args:
        seed: of all of them. kinds: around a `thing`, at any `place` or of `all`, the scenes of which are alike; by
            default all three, in shares of their own.
        patterns: share of things with a second colour.
    """
    rng = np.random.default_rng(seed)
    names = list(kinds) or list(_SHARES)
    shares = np.array([_SHARES[name] for name in names])
    while True:
        kind = names[rng.choice(len(names), p=shares / shares.sum())]
        scene = sample_scene(rng, str(rng.choice(list(_SCENES), p=list(_SCENES.values()))))
        hole = _MAKERS[kind](patterned(scene, rng, patterns), rng)
        if held_out(hole.prompt) == holdout:
            yield hole


def _around_thing(scene: Scene, rng: np.random.Generator) -> Hole:
    thing = scene.things[rng.integers(len(scene.things))]
    told = scene if rng.random() < 0.5 else replace(scene, things=(thing,), relation=None)
    return Hole(scene=scene, box=box_around(thing, rng), prompt=caption(told, rng), thing=thing)


def _anywhere(scene: Scene, rng: np.random.Generator) -> Hole:
    sides = rng.integers(SIZE // 8, SIZE * 3 // 4, size=2)
    left, top = (int(rng.integers(0, SIZE - side + 1)) for side in sides)
    return Hole(scene=scene, box=(left, top, int(sides[0]), int(sides[1])), prompt=caption(scene, rng))


def _everywhere(scene: Scene, rng: np.random.Generator) -> Hole:
    return Hole(scene=scene, box=(0, 0, SIZE, SIZE), prompt=caption(scene, rng))


_MAKERS = {"thing": _around_thing, "place": _anywhere, "all": _everywhere}
