"""Consistency distillation: a picture from any noise level in one step, along the paths of a guided teacher.

Luo et al., "Latent Consistency Models", 2023, arXiv 2310.04378; with an adapter as the student it is LCM-LoRA (Luo et
al., 2023, arXiv 2311.05556):

    L = mean of sqrt(d^2 + h^2) - h,    d = f(x_t, t, c) - f'(x_s, s, c)

x_s is where a step of the teacher's sampler leads from x_t: the untrained model under any guidance, which is so learnt
too. f' has the weights of now, or an average of them, and no gradient. With x_0 the clean latents that the network's
prediction implies,

    f(x, t) = c_skip(t) x + c_out(t) x_0,    c_skip = 1/4 / (tau^2 + 1/4),    c_out = tau / sqrt(tau^2 + 1/4)

with tau ten times the timestep (equation 9; those of diffusers' ``LCMScheduler``), so that f is the identity where
there is no noise. Of flow models x_0 is that by itself, and is taken as it is.

x_t are noised pictures, as in the paper, or states of the teacher's own rollouts, of which the next state is x_s: then
prompts are enough.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.guidance import guided
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Chain
from visiontune.diffusion.transition import transition
from visiontune.errors import UserError
from visiontune.objectives._distill import Distillation, DistillConfig, Seen, jittered, states_of
from visiontune.objectives._old import follow, old_policy
from visiontune.objectives.base import Tools, per_row
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel

# The standard deviation of data, and what multiplies a timestep, in the boundary scalings.
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


@dataclass(frozen=True, kw_only=True)
class Config(DistillConfig):
    """Options of consistency distillation."""

    states: Literal["teacher", "data"] = option(
        "teacher",
        help="noisy latents that are learnt from: of rollouts of the teacher, or pictures of data.root, noised",
    )
    steps: int = option(
        20, least=2, greatest=1000, help="steps of the teacher's sampler from noise to picture; d is over one of them"
    )
    huber: float = option(
        0.001, above=0, greatest=1e3, help="h: errors far above it count as they are, below it squared"
    )
    target_decay: float = option(
        0.0, least=0, below=1, help="of the average of weights that gives the target; 0 for the weights of now"
    )
    few_steps: int = option(4, least=1, greatest=50, help="steps that samplers are told to take")


def build(config: Config) -> Consistency:
    """The objective that ``config`` describes."""
    return Consistency(config)


def consistency(schedule: Schedule, pred: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """f: the clean latents ``[b, ...]`` that a prediction at x stands for; ``x`` itself at a negative timestep.

    Args:
        pred, x: ``[b, ...]``. t: ``[b]``.
    """
    x_0 = schedule.to_x_0(pred, x, t)
    if schedule.prediction != "flow":
        tau = (TIMESTEP_SCALING * t.double()).view(-1, *(1,) * (x.ndim - 1))
        total = tau.square() + SIGMA_DATA**2
        x_0 = (SIGMA_DATA**2 / total).to(x_0) * x + (tau / total.sqrt()).to(x_0) * x_0
    return torch.where((t < 0).view(-1, *(1,) * (x.ndim - 1)), x.to(x_0), x_0)


class Consistency(Distillation):
    """Logs ``error``, the mean absolute d, and ``target``, that of what f' gives."""

    config: Config
    sampler: str = "lcm"

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse a teacher's sampler that adds noise, which no function of its start can follow."""
        super().check(model, reward)
        if self.dynamics.stochastic:
            raise UserError(
                f"the teacher's path must be fixed by where it starts, and dynamics '{self.dynamics.name}' adds noise: "
                "set objective.dynamics=ddim"
            )
        if model.schedule.prediction == "flow":
            self.sampler = next(iter(model.samplers())) if hasattr(model, "samplers") else "model"

    def facts(self) -> dict[str, str]:
        """Besides, how many steps samplers are to take, and by which."""
        few = {"steps": self.config.few_steps, "scheduler": self.sampler}
        return {**super().facts(), "few_steps": json.dumps(few)}

    def chain(self, model: DiffusionModel, tools: Tools) -> Chain:
        """From the last timestep to the end, as the grid of ``LCMScheduler``; of flow the model's own steps."""
        if model.schedule.prediction == "flow":
            return super().chain(model, tools)
        total = model.schedule.num_train_timesteps
        start = torch.linspace(total, 0, self.config.steps + 1).round().long()[:-1] - 1
        share = float(torch.rand((), generator=tools.shared("jitter"))) if self.config.jitter else 0.0
        return jittered(start, share, torch.tensor([-1]))

    def visited(self, model: DiffusionModel, rows: Batch, chain: Chain, tools: Tools) -> Seen:
        with tools.reference():
            drawn = self.rollout(model, model.embed(rows.prompts), self.guidance(model), chain, rows, tools)
        assert drawn.latents is not None
        return states_of(drawn, drawn.latents[:, 1:], tools.generators(rows, "order"))

    def noised(self, model: DiffusionModel, x_t: Tensor, t: Tensor, cond: Condition, uncond: Condition | None) -> Seen:
        end = t - model.schedule.num_train_timesteps // self.config.steps
        end = torch.where(end < 0, -torch.ones_like(end), end)
        pred = guided(model, x_t, t, cond, uncond, self.guidance(model))
        target, _ = transition(model.schedule, pred, x_t, t, end, self.dynamics)
        return Seen(x=x_t, t=t, end=end, cond=cond, target=target)

    def loss(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Loss:
        self.follow(tools)
        return super().loss(model, batch, tools)

    def update(self, model: DiffusionModel, collected: list[Seen], part: int, tools: Tools) -> Loss:
        self.follow(tools)
        return super().update(model, collected, part, tools)

    def follow(self, tools: Tools) -> None:
        """Let the average of weights, where there is one, follow those of now."""
        if self.config.target_decay:
            follow(tools, self.config.target_decay)

    def errors(self, model: DiffusionModel, seen: Seen, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        target = self.target(model, seen, tools)
        error = consistency(model.schedule, model.predict(seen.x, seen.t, seen.cond), seen.x, seen.t) - target
        loss = (error.square() + self.config.huber**2).sqrt() - self.config.huber
        return per_row(loss), {"error": error.detach().abs().mean(), "target": target.abs().mean()}

    @torch.no_grad()
    def target(self, model: DiffusionModel, seen: Seen, tools: Tools) -> Tensor:
        """f' of where the teacher leads."""

        with old_policy(tools) if self.config.target_decay else nullcontext():
            pred = model.predict(seen.target, seen.end.clamp(min=0), seen.cond)
        return consistency(model.schedule, pred, seen.target, seen.end)
