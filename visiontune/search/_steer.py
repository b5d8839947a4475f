"""A rollout of groups of particles, which are resampled on the way by what their clean pictures are worth."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion.dynamics import Dynamics
from visiontune.diffusion.guidance import Guidance, guided
from visiontune.diffusion.replay import micro_batches
from visiontune.diffusion.trajectory import Chain, Sampled, Start
from visiontune.diffusion.transition import transition
from visiontune.errors import UserError
from visiontune.search._particles import Particles

# Rewards [n] of clean latents [n, c, (f), h, w], which are the given rows of all.
Value = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Steered:
    """The end of b groups of K particles, whose rows lie group by group.

    Attributes:
        final: [b K, c, (f), h, w]. rewards, weights: [b, K] float64; the weights of a group sum to 1.
        visits: of each step at which particles were weighed: its number, their rewards, and the particles from which
            they went on, None where no group was resampled.
    """

    final: Tensor
    rewards: Tensor
    weights: Tensor
    visits: list[tuple[int, Tensor, Tensor | None]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """How particles go: model, conditions of all rows, chain, guidance, dynamics and noise as of a rollout.

    Attributes:
        batch_size: rows that the network sees at once, at most.
    """

    model: Sampled
    cond: Condition
    uncond: Condition | None
    chain: Chain
    guidance: Guidance
    dynamics: Dynamics
    start: Start
    batch_size: int | None = None

    def begin(self) -> Any:
        """The guidance of one run."""
        if self.guidance.remembers:
            raise UserError(
                "the guidance remembers earlier steps (apg's momentum) or edits what they lead to, and particles are "
                "exchanged between the steps: set momentum to 0, and leave out terms that edit latents"
            )
        levels = self.chain[0].clamp(min=0) / self.model.schedule.num_train_timesteps
        return self.guidance.begin(self.model, levels.tolist())

    def predict(self, begun: Guidance, x: Tensor, t: Tensor) -> Tensor:
        """The guided prediction of all rows."""
        found = [
            guided(self.model, x[r], t[r], self.cond[r], None if self.uncond is None else self.uncond[r], begun)
            for r in micro_batches(len(x), self.batch_size)
        ]
        return torch.cat(found)


@torch.no_grad()
def steer(
    walk: Walk,
    particles: Particles,
    value: Value,
    *,
    visits: Collection[int],
    least: float,
    generators: Sequence[torch.Generator],
) -> Steered:
    """Sample groups of particles, and resample each group by the rewards of the clean latents that steps expect.

    Without a resampling it is the rollout of the same noise to the bit.

    Args:
        particles: new ones, which count groups and members.
        value: the reward. visits: numbers of the steps before which particles are weighed.
        least: share of effective particles below which a group is resampled.
        generators: one for each group, on the CPU, for its resampling.

    Raises:
        UserError: the guidance remembers steps, or does not suit the model.
    """
    model, begun = walk.model, walk.begin()
    start, end = (times.cpu() for times in walk.chain)
    groups, count = particles.log_weights.shape
    x, noise = walk.start.draw(model, len(walk.cond), len(start), walk.dynamics)
    seen: list[tuple[int, Tensor, Tensor | None]] = []

    def worth(x_0: Tensor) -> Tensor:
        parts = [value(x_0[r], range(len(x_0))[r]) for r in micro_batches(len(x_0), walk.batch_size)]
        return torch.cat(parts).to("cpu", torch.float64).view(groups, count)

    for i in range(len(start)):
        t, t_next = (times[i].to(x.device).expand(len(x)) for times in (start, end))
        pred = walk.predict(begun, x, t)
        if i in visits:
            rewards = worth(model.schedule.to_x_0(pred, x, t))
            particles.weigh(rewards)
            uniform = torch.stack([torch.rand((), generator=one, dtype=torch.float64) for one in generators])
            ancestors = particles.resample(least, uniform)
            seen.append((i, rewards, ancestors))
            if ancestors is not None:
                rows = (ancestors + torch.arange(groups)[:, None] * count).flatten().to(x.device)
                x, pred = x[rows], pred[rows]
        mean, deviation = transition(model.schedule, pred, x, t, t_next, walk.dynamics)
        x = mean if noise is None else mean + deviation * noise[:, i]
    rewards = worth(x)
    particles.weigh(rewards, last=True)
    return Steered(final=x, rewards=rewards, weights=particles.weights, visits=seen)
