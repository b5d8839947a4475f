"""Ratings of pictures: numbers under names, in whatever range they were given, as shares between worst and best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from visiontune.errors import UserError
from visiontune.outside import shown
from visiontune.schema import nearest

# Of each rating its worst and its best value, which may be the greater one or the smaller one.
Ranges = Mapping[str, tuple[float, float]]
UNTOLD = math.nan


def check_ranges(ranges: Ranges) -> None:
    """Refuse a rating whose worst value is its best.

    Raises:
        ValueError: it names the rating.
    """
    for name, (worst, best) in ranges.items():
        if worst == best:
            raise ValueError(f"scores.{name} goes from {worst:g} to {best:g}, which rates nothing: write [worst, best]")


def shares(told: Mapping[str, Any], ranges: Ranges, where: str) -> tuple[float, ...]:
    """Ratings in the order of ``ranges``, 0 for the worst and 1 for the best; nan for one that is missing or None.

    Args:
        told: ratings by their names. where: what to call the place in messages.

    Raises:
        UserError: one is no number, or lies outside of its range.
    """
    return tuple(_share(told.get(name), *bounds, f"{where}: '{name}'") for name, bounds in ranges.items())


def asked(given: Mapping[str, float | None] | None, ranges: Ranges) -> list[float | None]:
    """What is told of all that is drawn, in the order of ``ranges``: what is ``given``, else the best.

    Raises:
        UserError: a name that the adapter does not know, or a number outside of its range.
    """
    for name in given or {}:
        if not ranges:
            raise UserError(f"scores.{name}: no adapter here was told ratings: leave scores out, or name one that was")
        if name not in ranges:
            raise UserError(f"scores.{name}: the adapter was told no such rating{nearest(name, ranges)}")
    best = {name: bounds[1] for name, bounds in ranges.items()}
    found = shares({**best, **(given or {})}, ranges, "scores")
    return [None if math.isnan(share) else share for share in found]


def _share(told: Any, worst: float, best: float, where: str) -> float:
    if told is None:
        return UNTOLD
    try:
        number = math.nan if isinstance(told, bool) else float(told)
    except (TypeError, ValueError):
        number = math.nan
    low, high = sorted((worst, best))
    if not low <= number <= high:
        raise UserError(
            f"{where} is a number from {low:g} to {high:g}, not {shown(str(told))[:40]}: mend it, or the range in "
            "data.scores"
        )
    return (number - worst) / (best - worst)
