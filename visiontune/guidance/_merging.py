"""How MaxFusion makes one of the features of several controls: the mean where they agree, elsewhere the strongest.

Features are [k, b, c, h, w], of k controls; what they agree in and how strong they are is found by row and place, over
the channels, in float32 or better.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The decision, place by place.

    Attributes:
        threshold: of the correlation, above which two agree.
        tau: shares of those that do not are softmax(log v / tau); 0 gives all to the largest v, the first of equals.
    """

    threshold: float = 0.7
    tau: float = 0.0

    def final(self, given: Tensor, on: Tensor) -> Tensor:
        """One for all: [b, c, h, w] of [k, b, c, h, w]; `on` [k, b] says which of them are there, others count for
        nothing."""
        x = _exact(given)
        agreed, shares = self._decided(x, on)
        return torch.where(agreed, _mean(x, on), (shares * x).sum(0)).to(given.dtype)

    def inner(self, given: Tensor, on: Tensor) -> Tensor:
        """One for each, as `given`: what `final` chooses, with the deviation over channels that the own one has."""
        x = _exact(given)
        agreed, shares = self._decided(x, on)
        std = _variance(x).sqrt()
        # Of a winner without deviation, nobody has any.
        ratio = torch.where(std > 0, std[:, None] / std.clamp(min=_least(std)), 1.0)
        chosen = (torch.where(shares > 0, shares * ratio, 0.0) * x).sum(1)
        return torch.where(agreed, _mean(x, on), chosen).to(given.dtype)

    def _decided(self, x: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
        """Where all agree [b, 1, h, w], and elsewhere the shares [k, b, 1, h, w]."""
        there = on[:, :, None, None, None]
        agreed = x.new_ones(1, dtype=torch.bool)
        for (one, in_one), (other, in_other) in itertools.combinations(zip(x, there, strict=True), 2):
            agreed = agreed & ((correlation(one, other) > self.threshold) | ~(in_one & in_other))
        v = relative_variance(x).where(there, -1.0)
        if not self.tau:
            return agreed, torch.zeros_like(v).scatter(0, v.argmax(0, keepdim=True), 1.0) * there
        logits = (v.clamp(min=_least(v)).log() / self.tau).where(there, -torch.inf)
        return agreed, logits.softmax(0).where(there, 0.0)


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's, over the channels of [b, c, h, w]: [b, 1, h, w]; 0 where either has no variance."""
    a, b = (x - x.mean(-3, keepdim=True) for x in (one, other))
    scale = _variance(one).sqrt() * _variance(other).sqrt()
    return (a * b).mean(-3, keepdim=True) / scale.clamp(min=_least(scale))


def relative_variance(x: Tensor) -> Tensor:
    """v, [..., 1, h, w] of [..., c, h, w]: the variance over the channels, as a share of its sum over the row's places;
    0 where there is none."""
    variance = _variance(x)
    total = variance.sum((-1, -2), keepdim=True)
    return variance / total.clamp(min=_least(total))


def _variance(x: Tensor) -> Tensor:
    return x.var(-3, correction=0, keepdim=True)


def _mean(x: Tensor, on: Tensor) -> Tensor:
    """Of those that are there; 0 without any."""
    there = on[:, :, None, None, None]
    return x.where(there, 0.0).sum(0) / there.sum(0).clamp(min=1)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _least(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
