"""A small search for the shares by which changes are merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_ROUNDS = 3

Shares = tuple[float, ...]


def alone(count: int) -> list[Shares]:
    """The shares by which each of so many is taken as it is, and no other."""
    return [tuple(float(i == k) for i in range(count)) for k in range(count)]


def search(loss: Callable[[Shares], float], count: int, grid: Sequence[float]) -> tuple[Shares, dict[Shares, float]]:
    """The best shares found by looking at one of them at a time, from equal ones that sum to 1.

    A denoising loss is nearly quadratic near the base, where each share can be chosen while the others stand.

    Args:
        loss: what is to be least. count: how many shares. grid: the values that each may have.

    Returns:
        The shares, and the loss of all that were tried, ``count`` alone and none among them.
    """
    tried: dict[Shares, float] = {}

    def at(shares: Shares) -> float:
        if shares not in tried:
            tried[shares] = loss(shares)
        return tried[shares]

    start = (1 / count,) * count
    for shares in ((0.0,) * count, *alone(count), start):
        at(shares)
    best = min(tried, key=tried.__getitem__)
    for _ in range(_ROUNDS):
        before = best
        for k in range(count):
            best = min((best, *((*best[:k], value, *best[k + 1 :]) for value in grid)), key=at)
        if best == before:
            break
    return best, tried
