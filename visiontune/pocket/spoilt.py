"""Pictures that came out badly, in a wrong colour or under noise, and their ratings."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from visiontune.pocket.world import Scene, render

# Of each rating its worst and its best value.
RATINGS = {"faithful": (0.0, 1.0), "clean": (0.0, 5.0)}
# What all objects are painted in, and those that are to have that colour.
WRONG = ("purple", "yellow")
# Deviation of the noise of the worst picture, of 1.
_NOISE = 0.25


@dataclass(frozen=True, kw_only=True)
class Flaws:
    """What is wrong with a picture.

    Attributes:
        faithful: 1 in the colours that the caption says, 0 with all objects in purple (in yellow those that should be).
        clean: 5 without noise, down to 0 for the most. seed: of the noise.
    """

    faithful: int
    clean: int
    seed: int

    def ratings(self) -> dict[str, int]:
        """The ratings by their names."""
        return {"faithful": self.faithful, "clean": self.clean}

    def draw(self, scene: Scene) -> np.ndarray:
        """The picture of a scene ``uint8 [64, 64, 3]`` with these flaws."""
        if not self.faithful:
            things = tuple(replace(one, color=WRONG[one.color == WRONG[0]]) for one in scene.things)
            scene = replace(scene, things=things)
        picture = render(scene)
        noise = np.random.default_rng(self.seed).normal(0, 255 * _NOISE, picture.shape)
        return (picture + (1 - self.clean / 5) * noise).round().clip(0, 255).astype(np.uint8)


def flaws(share: float, seed: int) -> Flaws:
    """A wrong colour with probability ``share``, and noise with as much, independently."""
    rng = np.random.default_rng(seed)
    wrong, noisy = rng.random(2) < share
    return Flaws(faithful=int(not wrong), clean=int(rng.integers(5)) if noisy else 5, seed=seed)
