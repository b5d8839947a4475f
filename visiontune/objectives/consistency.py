"""Consistency distillation: a picture from any noise level in one step, along the paths of a guided teacher.

Luo et al., "Latent Consistency Models", 2023, arXiv 2310.04378; with an adapter as the student it is LCM-LoRA (Luo et
al., 2023, arXiv 2311.05556):

    L = mean of sqrt(d^2 + h^2) - h,    d = f(x_t, t, c) - f'(x_s, s, c)

x_s is where a step of the teacher's sampler leads from x_t: the untrained model under any guidance, which is so learnt
too. f' has the weights of now and no gradient, as in LCM-LoRA. With x_0 the clean latents that the network's
prediction implies,

    f(x, t) = c_skip(t) x + c_out(t) x_0,    c_skip = 1/4 / (tau^2 + 1/4),    c_out = tau / sqrt(tau^2 + 1/4)

with tau ten times the timestep (equation 9; those of diffusers' ``LCMScheduler``), so that f is the identity where
there is no noise. Of flow models x_0 is that by itself, and is taken as it is.

x_t are noised pictures, as in the paper, or states of the teacher's own rollouts, of which the next state is x_s: then
prompts are enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.guidance import guided
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.timesteps import Timesteps
from visiontune.diffusion.trajectory import Chain, require_no_memory
from visiontune.diffusion.transition import transition
from visiontune.errors import UserError
from visiontune.objectives._distilled import (
    Distilled,
    DistilledConfig,
    Seen,
    few_facts,
    few_sampler,
    refuse_told,
    shuffled,
)
from visiontune.objectives._online import parts_of
from visiontune.objectives.base import Needs, Tools, combine, per_row
from visiontune.objectives.cfg_distill import jittered
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel

# The standard deviation of data, and what multiplies a timestep, in the boundary scalings.
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


@dataclass(frozen=True, kw_only=True)
class Config(DistilledConfig):
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
    jitter: bool = option(True, help="move a rollout's inner steps by a random share of a step, so that all are seen")
    timesteps: Timesteps = option(Timesteps(), help="with states=data, the noise that is trained at")
    few_steps: int = option(4, least=1, greatest=50, help="steps that samplers are told to take")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.states == "teacher" and self.updates > self.steps:
            raise ValueError("updates must be at most steps: each takes states of its own from every rollout")


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


class Consistency(Distilled):
    """Logs ``error``, the mean absolute d, and ``target``, that of what f' gives."""

    config: Config
    sampler: str = "lcm"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.online:
            self.updates = config.updates

    @property
    def online(self) -> bool:
        """Whether states come from rollouts."""
        return self.config.states == "teacher"

    @property
    def needs(self) -> Needs:
        return Needs(columns=() if self.online else ("image",), online=self.online, reference=True, text=False)

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse a model that is told its guidance, and a path that its start does not decide."""
        super().check(model, reward)
        guidance = self.guidance(model)
        refuse_told(model, guidance)
        if self.dynamics.stochastic:
            raise UserError(
                f"the teacher's path must be fixed by where it starts, and dynamics '{self.dynamics.name}' adds noise: "
                "set objective.dynamics=ddim"
            )
        if not self.online:
            require_no_memory(guidance)
        self.sampler = few_sampler(model)

    def draw_timesteps(
        self, model: Any, shape: Any, rows: int, rng: torch.Generator, bounds: Tensor | None = None
    ) -> Tensor | None:
        return None if self.online else super().draw_timesteps(model, shape, rows, rng, bounds)

    def facts(self) -> dict[str, str]:
        """How many steps samplers are to take, by which, and that guidance is inside."""
        return few_facts(self.config, self.config.few_steps, self.sampler)

    def chain(self, model: DiffusionModel, tools: Tools) -> Chain:
        """From the last timestep to the end, as the grid of ``LCMScheduler``; of flow the model's own steps."""
        if model.schedule.prediction == "flow":
            start, end = model.chain(self.config.steps, model.latent_shape())
        else:
            total = model.schedule.num_train_timesteps
            start = torch.linspace(total, 0, self.config.steps + 1).round().long()[:-1] - 1
            end = torch.tensor([-1])
        share = float(torch.rand((), generator=tools.shared("jitter"))) if self.config.jitter else 0.0
        return jittered(start, share, end[-1:])

    def loss(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Loss:
        """Of noised pictures."""
        x_0 = batch.data["image"].float()
        t = self.config.timesteps.draw(model, x_0.shape[1:], len(x_0), tools.rng, batch.data.get("quantile"))
        t, eps = t.to(x_0.device), torch.randn(x_0.shape, generator=tools.rng).to(x_0.device)
        x_t = model.schedule.add_noise(x_0, eps, t)
        with tools.reference(), torch.no_grad():
            cond = model.embed(batch.prompts) if batch.cond is None else batch.cond
            seen = self.step(model, x_t, t, cond)
        errors, terms = self.errors(model, seen)
        return Loss(total=combine(errors, batch), terms=terms)

    def step(self, model: DiffusionModel, x_t: Tensor, t: Tensor, cond: Condition) -> Seen:
        """Where a step of the teacher, which the model is here, leads from states ``[b, ...]`` at ``t`` ``[b]``."""
        end = t - model.schedule.num_train_timesteps // self.config.steps
        end = torch.where(end < 0, -torch.ones_like(end), end)
        pred = guided(model, x_t, t, cond, self.away(model, len(x_t)), self.guidance(model))
        target, _ = transition(model.schedule, pred, x_t, t, end, self.dynamics)
        return Seen(x=x_t, t=t, end=end, cond=cond, target=target)

    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> list[Seen]:
        """All states of a rollout of each prompt and those that follow, of a row in an order of its own, on the CPU."""
        chain, found = self.chain(model, tools), []
        with tools.reference():
            for rows in parts_of(batch, self.config.micro_batch):
                drawn = self.visit(model, model.embed(rows.prompts), self.guidance(model), chain, rows, tools)
                assert drawn.latents is not None
                x, target, order = drawn.latents[:, :-1], drawn.latents[:, 1:], tools.generators(rows, "order")
                found.append(shuffled(x, drawn.timesteps, drawn.cond, target, order, drawn.ends))
        return found

    def update(self, model: DiffusionModel, collected: list[Seen], part: int, tools: Tools) -> Loss:
        return self.regress(model, collected, part, tools)

    def errors(self, model: DiffusionModel, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        target = self.target(model, seen)
        error = consistency(model.schedule, model.predict(seen.x, seen.t, seen.cond), seen.x, seen.t) - target
        loss = (error.square() + self.config.huber**2).sqrt() - self.config.huber
        return per_row(loss), {"error": error.detach().abs().mean(), "target": target.abs().mean()}

    @torch.no_grad()
    def target(self, model: DiffusionModel, seen: Seen) -> Tensor:
        """f' of where the teacher leads."""
        assert seen.end is not None
        pred = model.predict(seen.target, seen.end.clamp(min=0), seen.cond)
        return consistency(model.schedule, pred, seen.target, seen.end)
