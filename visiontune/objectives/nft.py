"""DiffusionNFT: pictures of high reward pull the model, those of low reward push it, by the forward process alone.

"DiffusionNFT: Online Diffusion Reinforcement with Forward Process", 2025, arXiv 2509.16117. Pictures x_0 are drawn by
an old policy, with any sampler and without log-probabilities. Around its prediction v_old lie two implicit policies

    v+ = beta v + (1 - beta) v_old,    v- = (1 + beta) v_old - beta v

and with r in [0, 1], the probability that a picture is a good one,

    L = E over x_0, t, eps of  r |v+ - target|^2 + (1 - r) |v- - target|^2

whose optimum is v_old + (2 r - 1) / beta (target - v_old). All is affine in the network's output, so v may be a
velocity, the noise or the clean picture. The authors' code measures the errors in x_0 and divides each by its own mean
absolute value (``normalise``), and holds the model to the base by ``kl_weight`` |v - v_ref|^2.

r is the advantage, the reward less the mean of its prompt over the deviation of all, brought to [0, 1]. The old policy
follows the trained one, old <- d old + (1 - d) trained before every rollout, with d growing over the rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.replay import micro_batches
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.timesteps import Timesteps, spread
from visiontune.objectives._advantages import group_advantages
from visiontune.objectives._draw import draw_scored
from visiontune.objectives._old import follow, old_policy
from visiontune.objectives._online import GroupConfig, Stepped, SteppedConfig
from visiontune.objectives.base import Needs, Tools
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Config(GroupConfig, SteppedConfig):
    """Options of DiffusionNFT."""

    RENAMED: ClassVar[dict[str, str]] = {"timesteps": "timestep_count"}

    group: int = option(8, least=2, greatest=65536, help="pictures of each prompt, whose rewards are compared")
    updates: int = option(
        1, least=1, greatest=65536, help="optimiser steps for each rollout, each with noise of its own"
    )
    steps: int = option(10, least=1, greatest=100_000, help="sampling steps of a rollout")
    cfg_scale: float = option(
        1.0,
        least=-1000,
        greatest=1000,
        help="guidance of the rollout; training has none, so other than 1 draws off-policy",
    )
    beta: float = option(
        1.0, above=0, greatest=1e6, help="share of the trained policy in the implicit ones; smaller moves further"
    )
    advantage_range: float = option(
        5.0, above=0, greatest=1e6, help="advantage, in deviations, at which a picture is certainly good or bad"
    )
    timestep_count: int | None = option(
        None,
        least=1,
        greatest=100_000,
        help="how many timesteps each picture is trained at in an update; null: as many as the sampler has",
    )
    timesteps: Timesteps | None = option(
        None, help="the density they are drawn from, one in each part of it; null: the sampler's own, each at most once"
    )
    normalise: bool = option(True, help="errors in x_0, each over its mean absolute value; false: plain, of the output")
    kl_weight: float = option(
        1e-4, least=0, greatest=1e6, help="weight of the squared distance to the base's prediction; 0 for none"
    )
    decay_start: int = option(
        0,
        least=0,
        greatest=1_000_000_000,
        help="rollout from which d grows; before it the old policy is the trained one",
    )
    decay_rate: float = option(1e-3, least=0, greatest=1e6, help="growth of d with each rollout; 0 stays on-policy")
    decay_max: float = option(0.5, least=0, greatest=1, help="greatest d")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps is None and self.timestep_count is not None and self.timestep_count > self.steps:
            raise ValueError("timestep_count must be at most steps, or null for all, unless timesteps has a density")


def build(config: Config) -> NFT:
    """The objective that ``config`` describes."""
    return NFT(config)


@dataclass(frozen=True, kw_only=True, eq=False)
class Collected:
    """A rollout of ``b`` rows.

    Attributes:
        x_0: ``[b, c, (f), h, w]`` what was drawn. cond: for whom.
        timesteps: ``[T]`` of the sampler.
        optimality: r ``[b]``.
        rows: ``[b]`` their numbers among those of all processes.
        terms: what the log says of the rollout.
    """

    x_0: Tensor
    cond: Condition
    timesteps: Tensor
    optimality: Tensor
    rows: Tensor
    terms: dict[str, Tensor]


def implicit(pred: Tensor, old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The positive and the negative policy around the old one."""
    return beta * pred + (1 - beta) * old, (1 + beta) * old - beta * pred


class NFT(Stepped):
    """Logs the reward, the share of prompts without any difference, d, and squared distances to old and base."""

    config: Config

    @property
    def needs(self) -> Needs:
        return replace(super().needs, text=False, reference=self.config.kl_weight > 0)

    def decay(self, index: int) -> float:
        """d before rollout number ``index``."""
        return min(max(index - self.config.decay_start, 0) * self.config.decay_rate, self.config.decay_max)

    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Collected:
        config = self.config
        follow(tools, self.decay(tools.index))
        with old_policy(tools):
            trajectories, own, terms = draw_scored(self, model, batch, tools)
        rewards, prompts = tools.gather(own), tools.gather(batch.data["prompt"])
        noise = config.reward_noise
        advantages = group_advantages(rewards.cpu().double(), prompts.cpu(), global_std=True, noise=noise).to(rewards)
        good = (advantages / (2 * config.advantage_range) + 0.5).clamp(0, 1)
        same = prompts[:, None] == prompts[None]
        flat = (same & (rewards[:, None] != rewards[None])).sum(1) == 0
        return Collected(
            x_0=torch.cat([t.final for t in trajectories]),
            cond=Condition.cat([t.cond for t in trajectories]),
            timesteps=trajectories[0].timesteps,
            optimality=good[tools.rank * len(own) : (tools.rank + 1) * len(own)],
            rows=batch.data["row"],
            terms={
                **terms,
                "flat_groups": flat.to(rewards).mean(),
                "decay": rewards.new_tensor(self.decay(tools.index)),
            },
        )

    def update(self, model: DiffusionModel, collected: Collected, part: int, tools: Tools) -> Loss:
        t, eps = self.noised(model, collected, part, tools)
        x_t = [
            model.schedule.add_noise(collected.x_0, eps[:, k], t[:, k].to(model.device)).to(collected.x_0)
            for k in range(t.shape[1])
        ]
        t = t.to(model.device)

        def predict(k: int, rows: slice) -> Tensor:
            return _wide(model.predict(x_t[k][rows], t[rows, k], collected.cond[rows]))

        places = [
            (k, rows) for rows in micro_batches(len(collected.x_0), self.config.micro_batch) for k in range(len(x_t))
        ]
        with old_policy(tools):
            olds = [predict(*place) for place in places]
        bases: list[Tensor | None] = [None] * len(places)
        if self.config.kl_weight:
            with tools.reference(), torch.no_grad():
                bases = [predict(*place) for place in places]
        total, kl, moved = torch.zeros(3, device=model.device)
        for (k, rows), old, base in zip(places, olds, bases, strict=True):
            share = (rows.stop - rows.start) / t.numel()
            pred = predict(k, rows)
            given = collected.x_0[rows], eps[rows, k], x_t[k][rows], t[rows, k]
            loss = share * self.errors(model.schedule, pred, old, *given, collected.optimality[rows]).mean()
            if base is not None:
                distance = share * (pred - base).square().mean()
                loss = loss + self.config.kl_weight * distance
                kl += distance.detach()
            (tools.scale * loss).backward()
            total += loss.detach()
            moved += share * (pred.detach() - old).square().mean()
        return Loss(total=total, terms={**collected.terms, "kl": kl, "moved": moved})

    def noised(self, model: DiffusionModel, collected: Collected, part: int, tools: Tools) -> tuple[Tensor, Tensor]:
        """Timesteps ``[b, k]`` on the CPU and noise ``[b, k, c, (f), h, w]``, which belong to the rows' numbers."""
        count, shape = self.config.timestep_count or len(collected.timesteps), collected.x_0.shape[1:]
        chosen, noise = [], []
        for row in collected.rows.tolist():
            rng = tools.shared("noise", part, row)
            if self.config.timesteps is None:
                chosen.append(collected.timesteps[torch.randperm(len(collected.timesteps), generator=rng)[:count]])
            else:
                chosen.append(self.config.timesteps.draw(model, shape, count, rng, spread(count, rng)))
            noise.append(torch.randn((count, *shape), generator=rng))
        return torch.stack(chosen), torch.stack(noise).to(collected.x_0)

    def errors(
        self,
        schedule: Schedule,
        pred: Tensor,
        old: Tensor,
        x_0: Tensor,
        eps: Tensor,
        x_t: Tensor,
        t: Tensor,
        optimality: Tensor,
    ) -> Tensor:
        """``r |v+ - target|^2 + (1 - r) |v- - target|^2``, or the normalised form of it, ``[b]``."""
        good, bad = implicit(pred, old, self.config.beta)
        if not self.config.normalise:
            target = schedule.target(x_0, eps, t)
            one, two = ((v - target).square().flatten(1).mean(1) for v in (good, bad))
            return optimality * one + (1 - optimality) * two
        one, two = (_own_scale(schedule.to_x_0(v, x_t, t) - x_0) for v in (good, bad))
        both = optimality * one + (1 - optimality) * two
        return self.config.advantage_range / self.config.beta * both


def _own_scale(error: Tensor) -> Tensor:
    """Mean square over the mean absolute value, a constant, ``[b]``."""
    flat = error.flatten(1)
    return flat.square().mean(1) / flat.detach().abs().mean(1).clamp(min=1e-5)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
