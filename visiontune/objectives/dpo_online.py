"""Online DPO: the best and the worst of a group of the model's own pictures are a pair of Diffusion-DPO.

The loss is that of :mod:`visiontune.objectives.diffusion_dpo` (Wallace et al., 2023, arXiv 2311.12908); the pairs are
made by a reward, from ``group`` pictures of each prompt drawn by the present weights. Groups whose rewards are all
equal count as no pair. Any sampler will do, since pictures are noised again for training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.replay import micro_batches
from visiontune.diffusion.timesteps import spread
from visiontune.objectives import diffusion_dpo
from visiontune.objectives._advantages import indistinct
from visiontune.objectives._draw import draw_scored, same_prompt
from visiontune.objectives._online import GroupConfig, Stepped, SteppedConfig
from visiontune.objectives.base import Needs, Tools
from visiontune.objectives.diffusion_dpo import preference, said
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Config(GroupConfig, SteppedConfig, diffusion_dpo.Config):
    """Options of online DPO, besides those of Diffusion-DPO."""

    RENAMED: ClassVar[dict[str, str]] = {**diffusion_dpo.Config.RENAMED, "timesteps": "timestep_count"}

    group: int = option(
        8, least=2, greatest=65536, help="pictures of each prompt, the best and the worst of which are a pair"
    )
    updates: int = option(
        4, least=1, greatest=65536, help="optimiser steps for each rollout, each with noise and timesteps of its own"
    )
    steps: int = option(15, least=1, greatest=100_000, help="sampling steps of a rollout")
    timestep_count: int = option(
        4,
        least=1,
        greatest=100_000,
        help="how many each pair is trained at in an update, one in each part of the range",
    )

    def __post_init__(self) -> None:
        SteppedConfig.__post_init__(self)
        diffusion_dpo.Config.__post_init__(self)


def build(config: Config) -> OnlineDPO:
    """The objective that ``config`` describes."""
    return OnlineDPO(config)


@dataclass(frozen=True, kw_only=True, eq=False)
class Collected:
    """Pairs of a rollout.

    Attributes:
        chosen, rejected: ``[p, c, (f), h, w]`` latents. cond: of their prompts.
        weight: ``[p]``, 0 where the rewards are equal, else one over the number of pairs, the mean over processes being
            taken.
        rows: ``[p]`` the pairs' numbers among those of all processes.
        terms: what the log says of the rollout.
    """

    chosen: Tensor
    rejected: Tensor
    cond: Condition
    weight: Tensor
    rows: Tensor
    terms: dict[str, Tensor]


class OnlineDPO(Stepped):
    """Logs the reward, its mean difference within pairs, the share of ties, and what Diffusion-DPO logs."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.pairs = diffusion_dpo.DiffusionDPO(config)

    @property
    def needs(self) -> Needs:
        return replace(super().needs, text=False, reference=True)

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse what the loss of the pairs does."""
        super().check(model, reward)
        self.pairs.check(model, reward)

    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Collected:
        config = self.config
        same_prompt(batch, config.group)
        trajectories, own, terms = draw_scored(self, model, batch, tools)
        x_0, cond = torch.cat([t.final for t in trajectories]), Condition.cat([t.cond for t in trajectories])
        first = torch.arange(0, len(own), config.group, device=own.device)
        grouped = own.view(-1, config.group)
        best, worst = first + grouped.argmax(1), first + grouped.argmin(1)
        gap = grouped.amax(1) - grouped.amin(1)
        gap = torch.where(gap > indistinct(grouped.amax(1), config.reward_noise), gap, 0)
        gaps = tools.gather(gap)
        pairs = (gaps > 0).sum().clamp(min=1)
        return Collected(
            chosen=x_0[best],
            rejected=x_0[worst],
            cond=cond[best],
            weight=(gap > 0) * (tools.world / pairs),
            rows=batch.data["row"][first],
            terms={
                **terms,
                "gap": gaps.mean(),
                "ties": (gaps == 0).to(gaps).mean(),
            },
        )

    def update(self, model: DiffusionModel, collected: Collected, part: int, tools: Tools) -> Loss:
        t, eps = self.noised(model, collected, part, tools)
        size = None if self.config.micro_batch is None else max(1, self.config.micro_batch // 2)
        places = [(k, rows) for rows in micro_batches(len(t), size) for k in range(t.shape[1])]

        def errors(k: int, rows: slice) -> Tensor:
            pictures = collected.chosen[rows], collected.rejected[rows]
            return self.pairs.both(model, *pictures, eps[rows, k], t[rows, k], collected.cond[rows])

        with tools.reference(), torch.no_grad():
            bases = [errors(*place) for place in places]
        total, terms = torch.zeros((), device=model.device), dict(collected.terms)
        for (k, rows), base in zip(places, bases, strict=True):
            found = errors(k, rows)
            losses, inside = preference(found, base, self.config.beta)
            losses = losses + self.config.sft_weight * found[0]
            loss = (collected.weight[rows] * losses).sum() / t.shape[1]
            (tools.scale * loss).backward()
            total += loss.detach()
            share = (rows.stop - rows.start) / t.numel()
            for name, value in said(found, base, inside).items():
                terms[name] = terms.get(name, 0) + share * value
        return Loss(total=total, terms=terms)

    def noised(self, model: DiffusionModel, collected: Collected, part: int, tools: Tools) -> tuple[Tensor, Tensor]:
        """Timesteps ``[p, k]`` and noise ``[p, k, c, (f), h, w]`` of each pair, which belong to its number."""
        count, chosen, noise = self.config.timestep_count, [], []
        for row in collected.rows.tolist():
            rng = tools.shared("noise", part, row)
            places = spread(count, rng)
            chosen.append(self.config.timesteps.draw(model, collected.chosen.shape[1:], count, rng, places))
            noise.append(self.pairs.noise(collected.chosen.new_zeros(count, *collected.chosen.shape[1:]), rng))
        return torch.stack(chosen).to(model.device), torch.stack(noise).to(collected.chosen)
