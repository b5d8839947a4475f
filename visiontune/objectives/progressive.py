"""Progressive distillation: one step of the student for two of its teacher, which halves the steps of a sampler.

Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, arXiv 2202.00512; stage 2 of
Meng et al., 2023, arXiv 2210.03142. With the student's steps t -> n on the family's own grid and m between their ends:

    x_n = S(S(x_t, t, m; f_0), m, n; f_0)               two deterministic steps S of the teacher f_0
    p   with   a x_t + b p = x_n                        what must be predicted at x_t so that one step leads there
    L   = mean of omega(t) (f(x_t, t, c) - p)^2,        omega(t) = max(SNR, 1) of the error in x_0

a and b are the sampler's own weights of a step t -> n, so it holds for eps, v and flow alike. The teacher is the model
as the run finds it: the student of the round before (adapter.start), or the base. States are those of the teacher's
rollouts, each second of which is x_n of the one before, so that targets come with them and only prompts are needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visiontune.core import Batch, Loss
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Chain
from visiontune.diffusion.transition import kernel
from visiontune.errors import UserError
from visiontune.objectives._distilled import Distilled, DistilledConfig, Seen, shuffled
from visiontune.objectives._old import follow, old_policy
from visiontune.objectives._online import parts_of
from visiontune.objectives.base import Needs, Tools
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Config(DistilledConfig):
    """Options of a round."""

    steps: int = option(8, least=1, greatest=1000, help="the student's sampling steps; its teacher takes twice as many")
    cfg_scale: float = option(
        1.0, least=-1000, greatest=1000, help="the teacher's guidance; 1 where it has guidance inside, or none"
    )
    updates: int = option(4, least=1, greatest=1000, help="optimiser steps that share the states of a rollout")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.updates > self.steps:
            raise ValueError("updates must be at most steps: each takes states of its own from every rollout")


def build(config: Config) -> Progressive:
    """The objective that ``config`` describes."""
    return Progressive(config)


class Progressive(Distilled):
    """Learns by regression to where two steps of the teacher lead."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.updates = config.updates

    @property
    def needs(self) -> Needs:
        return Needs(online=True, text=False)

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse a sampler with noise, and a model that is told its guidance."""
        super().check(model, reward)
        if self.dynamics.stochastic:
            raise UserError("two steps with noise lead to no one place: set objective.dynamics to ddim, with eta 0")
        if getattr(model, "embedded", False):
            raise UserError(
                f"model '{model.source}' ({model.family}) is told its guidance, and steps are halved at one strength: "
                "distil that one first (objective=cfg_distill with cfg_scale), and start from it (adapter.start)"
            )

    def facts(self) -> dict[str, str]:
        """How the result is to be drawn."""
        config, told = self.config, {"few_steps": json.dumps({"steps": self.config.steps, "scheduler": "model"})}
        if config.cfg_scale == 1 and not config.guidance:
            return told
        teacher = {"cfg_scale": config.cfg_scale, **({"guidance": config.guidance} if config.guidance else {})}
        return {**told, "distilled_guidance": json.dumps(teacher)}

    def setup(self, model: Any, tools: Tools) -> None:
        """The teacher is the model as it is now."""
        follow(tools, decay=1.0)

    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> list[Seen]:
        """All states of a rollout of the teacher, one for each step of the student, and its targets, on the CPU."""
        follow(tools, decay=1.0)
        with old_policy(tools):
            return [self._of_teacher(model, rows, tools) for rows in parts_of(batch, self.config.micro_batch)]

    def update(self, model: DiffusionModel, collected: list[Seen], part: int, tools: Tools) -> Loss:
        return self.regress(model, collected, part, tools)

    def _of_teacher(self, model: DiffusionModel, rows: Batch, tools: Tools) -> Seen:
        begin, end = (value.cpu() for value in model.chain(self.config.steps, model.latent_shape()))
        chain = doubled(begin, end)
        drawn = self.visit(model, model.embed(rows.prompts), self.guidance(model), chain, rows, tools)
        assert drawn.latents is not None
        x, reached = drawn.latents[:, :-1:2], drawn.latents[:, 2::2]
        target = self.leading(model.schedule, x, reached, begin, end)
        return shuffled(x, begin, drawn.cond, target, tools.generators(rows, "order"))

    def leading(self, schedule: Schedule, x: Tensor, reached: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """What must be predicted at ``x`` so that one step leads to ``reached``, ``[b, T, ...]`` each.

        Args:
            begin, end: ``[T]`` timesteps of the steps. One that goes nowhere, to which nothing leads, has target 0.
        """
        of_x, of_pred, _ = (
            value.view(1, -1, *(1,) * (x.ndim - 2)) for value in kernel(schedule, begin, end, self.dynamics)
        )
        moves = of_pred != 0
        wanted = (reached.double() - of_x.to(x.device) * x.double()) / torch.where(moves, of_pred, 1.0).to(x.device)
        return (wanted * moves.to(x.device)).to(reached.dtype)

    def weight(self, model: DiffusionModel, t: Tensor) -> Tensor:
        """Equation 9 of the paper, truncated SNR, for errors in what the network predicts."""
        return truncated_snr_weight(model.schedule, t)


def doubled(begin: Tensor, end: Tensor) -> Chain:
    """The chain with every step cut in two.

    Args:
        begin, end: ``[T]`` timesteps; whole ones stay whole, and an end below 0 is the clean end.
    """
    middle = (begin + end.clamp(min=0)) / 2
    if not begin.is_floating_point():
        middle = middle.floor().to(begin.dtype)
    starts, ends = torch.stack([begin, middle], 1), torch.stack([middle, end], 1)
    return starts.flatten(), ends.flatten()


def truncated_snr_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """Weight ``[n]`` of squared errors of the prediction by which errors in x_0 count ``max(SNR, 1)``.

    That is max(alpha^2, sigma^2) / sigma^2, over the square of `Schedule.per_x_0`; finite where sigma is 0.
    """
    alpha, sigma = (level.square() for level in schedule.levels(t, 1))
    most = torch.maximum(alpha, sigma)
    return {"eps": most / alpha, "x0": most / sigma}.get(schedule.prediction, most).float()
