"""Weights and resampling of particles: sequential Monte Carlo whose target is a sampler tilted by a reward.

b groups of K particles are weighted alike, [b, K] in float64. The product of all potentials of a particle is
exp(scale reward of its end), whatever the potential is called, so all of them have one target; they differ in when
particles are given up (Singhal et al., 2025, arXiv 2501.06848, section 3).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Potential = Literal["difference", "max", "sum"]
_ROUNDING = 1e-9


class Particles:
    """What the weights of b groups of K particles depend on.

    Attributes:
        log_weights: [b, K] since a group was resampled last.
    """

    def __init__(self, groups: int, count: int, *, potential: Potential, scale: float) -> None:
        self.potential, self.scale = potential, scale
        zero = torch.zeros(groups, count, dtype=torch.float64)
        self.log_weights = zero
        self._spent = zero
        self._latest = zero
        self._highest = torch.full_like(zero, -torch.inf)
        self._sum = zero

    def weigh(self, rewards: Tensor, *, last: bool = False) -> None:
        """Multiply the weights by the potentials of rewards [b, K].

        Args:
            last: they are those of the finished pictures, whose potential makes up what is lacking.
        """
        self._highest = torch.maximum(self._highest, rewards)
        self._sum = self._sum + rewards
        gain = {"difference": rewards - self._latest, "max": self._highest, "sum": self._sum}[self.potential]
        self._latest = rewards
        log_potential = self.scale * rewards - self._spent if last else self.scale * gain
        self._spent = self._spent + log_potential
        self.log_weights = self.log_weights + log_potential

    @property
    def weights(self) -> Tensor:
        """[b, K], each group's sum being 1."""
        return self.log_weights.softmax(dim=1)

    def resample(self, least: float, uniform: Tensor) -> Tensor | None:
        """Draw the particles of groups anew whose effective number has fallen below `least` of K.

        Args:
            uniform: [b] in [0, 1), one number for each group.

        Returns:
            [b, K] the particle from which each goes on, or None where no group was resampled.
        """
        weights = self.weights
        count = weights.shape[1]
        uneven = effective(weights) < least * count * (1 - _ROUNDING)
        if not bool(uneven.any()):
            return None
        drawn = torch.stack([systematic(row, u) for row, u in zip(weights, uniform, strict=True)])
        ancestors = torch.where(uneven[:, None], drawn, torch.arange(count).expand_as(drawn))
        for name in ("_spent", "_latest", "_highest", "_sum"):
            setattr(self, name, getattr(self, name).gather(1, ancestors))
        self.log_weights = torch.where(uneven[:, None], 0.0, self.log_weights)
        return ancestors


def effective(weights: Tensor) -> Tensor:
    """Effective number of particles, 1 / sum w^2 [b], of weights [b, K] whose sums are 1."""
    return 1 / weights.square().sum(1)


def systematic(weights: Tensor, uniform: float | Tensor) -> Tensor:
    """Systematic resampling: [K] indices, in order, of which w_k K are k on average, rounded up or down.

    Kitagawa, 1996: the places (i + uniform) / K, i = 0 .. K - 1, are looked up in the running sum of the weights.

    Args:
        weights: [K] float64, not negative. uniform: a number of [0, 1).
    """
    count = len(weights)
    reached = weights.cumsum(0)
    places = (torch.arange(count, dtype=weights.dtype) + uniform) / count
    # The last sum is 1 in this way, to the bit, and nothing without weight is found.
    return torch.searchsorted(reached / reached[-1], places, right=True)
