"""What of a caption a picture shows, one thing after the other: the oracle's answer in parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from visiontune.pocket.oracle import Request, assignments, fits, ground_of, holds, read, read_caption


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is there of what a caption asks.

    Attributes:
        things: for each object that is asked for, whether the picture has one for it alone; as many as can have one.
        count: whether there are as many objects as are asked for, whatever they are.
        relation: whether the two objects stand so, False where one of them is missing; None where none is asked for.
        ground: whether tone and texture are right; None where none are asked for.
    """

    things: tuple[bool, ...]
    count: bool
    relation: bool | None
    ground: tuple[bool, bool] | None

    @property
    def everything(self) -> bool:
        """Whether all of it is there, and no further object."""
        return self.count and all(self.things) and self.relation is not False and all(self.ground or ())


def shown(image: np.ndarray, caption: str | Request) -> Shown:
    """Read an image ``uint8 [64, 64, 3]`` against a caption of the pocket world's grammar.

    Raises:
        ValueError: the caption names no object, or the image has another size.
    """
    request = read_caption(caption) if isinstance(caption, str) else caption
    found, wanted = read(image), request.things
    fitting = np.array([[fits(one, thing) for one in found] for thing in wanted]).reshape(len(wanted), len(found))
    pairs = zip(*linear_sum_assignment(fitting, maximize=True), strict=True)
    hits = {int(thing) for thing, one in pairs if fitting[thing, one]}
    tone, texture = ground_of(image)
    return Shown(
        things=tuple(i in hits for i in range(len(wanted))),
        count=len(found) == len(wanted),
        relation=None
        if request.relation is None
        else any(holds(request.relation, a.thing, b.thing) for a, b in assignments(found, wanted)),
        ground=None if request.ground is None else (tone == request.ground[0], texture == request.ground[1]),
    )
