"""The base beneath the adapters, and how its predictions differ from others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from visiontune.adapters import attached
from visiontune.guidance.base import Point


def towards(difference: Tensor, point: Point) -> Tensor:
    """By how much clean pictures differ, over sigma, whose predictions at the same latents differ by so much."""
    assert point.schedule is not None
    _, sigma = point.schedule.levels(point.t, difference.ndim)
    return difference / (sigma * point.schedule.per_x_0(point.t, difference.ndim)).to(difference)


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """In the block the model is the base."""
    with ExitStack() as stack:
        for one in attached(model.networks()).values():
            stack.enter_context(one.disable())
        yield
