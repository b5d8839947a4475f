"""From scores and a budget to decisions: ranks in proportion, or the largest entries of several tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from visiontune.errors import UserError

# For values that are not negative the order of the bits, read as a whole number, is that of the values.
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def proportional(
    scores: Mapping[str, float],
    budget: int,
    *,
    costs: Mapping[str, int] | None = None,
    floor: int = 0,
    caps: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Whole numbers in proportion to ``scores``, between ``floor`` and ``caps``, that cost at most ``budget``.

    With every cost 1 their sum is the budget, otherwise less than the dearest one is left over; more is left only where
    nothing with a positive score is below its cap. A higher score never gets less, unless its cap is lower. Equal
    scores, and scores that are all zero, share alike; where that does not come out even, the first get one more.

    Args:
        scores: by name, not negative.
        budget: in the unit of ``costs``.
        costs: of one; default 1.
        floor: the least that each gets, or its cap where that is lower.
        caps: the most that each gets; default no limit.

    Raises:
        UserError: a score is not finite, or the floor costs more than the budget.
    """
    for name, score in scores.items():
        _check_finite(name, math.isfinite(score))
    costs, caps = costs or dict.fromkeys(scores, 1), caps or dict.fromkeys(scores, budget)
    low = {name: min(floor, caps[name]) for name in scores}
    if (least := sum(costs[name] * low[name] for name in scores)) > budget:
        raise UserError(f"{floor} for each of {len(scores)} layers costs {least}, the budget is {budget}: raise it")
    top = max(scores.values(), default=0.0)
    shares = {name: score / top if top else 1.0 for name, score in scores.items()}

    def at(level: float) -> dict[str, float]:
        return {name: min(max(level * share, low[name]), caps[name]) for name, share in shares.items()}

    # The cost grows with the level without jumps, so bisection may go on until there is no number in between.
    under, over = 0.0, max((min(caps[n] / share, 1e300) for n, share in shares.items() if share), default=0.0)
    while under < (middle := (under + over) / 2) < over:
        if sum(costs[name] * value for name, value in at(middle).items()) > budget:
            over = middle
        else:
            under = middle
    exact = at(under)
    found = {name: math.floor(value) for name, value in exact.items()}
    left = budget - sum(costs[name] * number for name, number in found.items())
    # To go on after the first that is too dear would let a lower score overtake.
    for name in sorted(scores, key=lambda name: found[name] - exact[name]):
        if found[name] == exact[name] or costs[name] > left:
            break
        found[name] += 1
        left -= costs[name]
    return found


def largest(
    scores: Mapping[str, Tensor], budget: int, cost: Callable[[Mapping[str, int]], int] | None = None
) -> dict[str, Tensor]:
    """Flat positions, ascending, of the largest entries over all tensors: as many as the budget pays for.

    Entries are taken in the order of their values, and equal ones in that of the tensors and positions, until the next
    would cost too much. Zeros are never taken. Nothing is sorted or joined, so little memory is needed beside the
    scores.

    Args:
        scores: float32 or float64, not negative.
        budget: in the unit of ``cost``.
        cost: of taking so many of each tensor; default: one for each entry. Where it does not grow with each of them,
            the order is cut at one of the places where the next entry would go over the budget.

    Raises:
        UserError: a score is not finite.
    """
    pay = cost or (lambda counts: sum(counts.values()))
    for name, values in scores.items():
        _check_finite(name, bool(values.isfinite().all()))
    bits = {name: values.flatten().view(_BITS[values.dtype]) for name, values in scores.items()}

    def at(level: int) -> dict[str, int]:
        return {name: int((b >= level).sum()) for name, b in bits.items()}

    # Affordable at ``over``, too dear at ``under``, unless all can be had.
    under, over = 0, max((int(b.max()) for b in bits.values() if b.numel()), default=0) + 1
    while over - under > 1:
        middle = (under + over) // 2
        if pay(at(middle)) > budget:
            under = middle
        else:
            over = middle
    above = at(over)
    ties = {name: int((b == under).sum()) if under else 0 for name, b in bits.items()}

    def first(count: int) -> dict[str, int]:
        """How many of each tensor are among the first ``count`` equal ones."""
        taken = {}
        for name, number in ties.items():
            taken[name] = min(number, count)
            count -= taken[name]
        return taken

    few, many = 0, sum(ties.values())
    while many - few > 1:
        middle = (few + many) // 2
        more = first(middle)
        if pay({name: above[name] + more[name] for name in bits}) > budget:
            many = middle
        else:
            few = middle
    more = first(few)
    found = {}
    for name, b in bits.items():
        chosen = (b >= over).nonzero().squeeze(1)
        if more[name]:
            chosen = torch.cat([chosen, (b == under).nonzero().squeeze(1)[: more[name]]]).sort().values
        found[name] = chosen
    return found


def _check_finite(name: str, finite: bool) -> None:
    if not finite:
        raise UserError(f"the score of layer '{name}' is not finite: plan in a wider dtype (train.mixed_precision)")
