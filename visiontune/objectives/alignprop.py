"""Reward back-propagation: the gradient of a differentiable reward through the sampler.

    L = -E[R(decode(x_0))],   x_0 = the end of a chain x_T -> ... -> x_0 under the present weights

AlignProp (Prabhudesai et al., 2023, arXiv 2310.03739) follows the gradient through the last K of N steps, with K drawn
anew for each update (``truncation: uniform``, its paper; ``normal``, its code) so that the model neither collapses as
with all steps nor learns textures alone as with few. DRaFT (Clark et al., 2023, arXiv 2309.17400) is K = N (``full``)
or a fixed K (``fixed``); DRaFT-LV is K = 1 with ``copies``: the end is noised again to where the last step began,
several times, and the gradients of that step are averaged. ReFL (Xu et al., 2023, arXiv 2304.05977) stops the chain at
a random late step and goes from there to a clean picture in one (``truncation: early_end``).

TextCraftor (Li et al., 2024, arXiv 2403.18978) trains the text encoder, and gives its conditions to the last steps
alone: the first ``base_steps`` are those of the untrained encoder, and none of them has a gradient.

Memory is that of one denoiser call or of decoding, whichever is more (see ``diffusion/pathwise.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from visiontune.core import Batch, Loss
from visiontune.diffusion.dynamics import make_dynamics
from visiontune.diffusion.pathwise import backpropagate, end_gradient, into_conditions
from visiontune.diffusion.trajectory import Trajectory, rollout
from visiontune.errors import UserError
from visiontune.objectives._online import Online, Tools, conditions, parts_of, pixels, score
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.base import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of reward back-propagation."""

    steps: int = option(25, help="N, sampling steps of a rollout")
    cfg_scale: float = option(4.0, help="guidance of the rollout; 1 for none")
    dynamics: Any = option("ddim", help="how the sampler steps: a name, or {name: ddim, eta: 1.0}")
    truncation: Literal["uniform", "normal", "fixed", "full", "early_end"] = option(
        "uniform", help="steps with a gradient: random (uniform, normal), grad_steps, all, or the last of a cut chain"
    )
    grad_steps: int = option(1, help="K for fixed; for normal its mean")
    earliest: float = option(0.5, help="share of the chain that is done at least before an early end")
    base_steps: int = option(0, help="first steps that see the prompt as the untrained text encoder reads it")
    copies: int = option(1, help="DRaFT-LV: noised copies of the end over which a last step's gradient is averaged")
    target: float | None = option(None, help="pull the reward to this value instead of up without bound")
    micro_batch: int | None = option(None, help="pictures drawn and differentiated at once; null for all")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.copies < 1:
            raise ValueError("steps and copies must be at least 1")
        if not 0 <= self.base_steps < self.steps:
            raise ValueError("base_steps must be at least 0 and less than steps")
        if not 1 <= self.grad_steps <= self.steps - self.base_steps:
            raise ValueError("grad_steps must be from 1 to steps, less base_steps")
        if not 0 <= self.earliest < 1:
            raise ValueError("earliest must be in [0, 1)")
        if self.copies > 1 and (self.truncation, self.grad_steps) != ("fixed", 1):
            raise ValueError(
                "copies average the gradient of the last step: set truncation to fixed and grad_steps to 1"
            )
        make_dynamics(self.dynamics)


def build(config: Config) -> AlignProp:
    """The objective that ``config`` describes."""
    return AlignProp(config)


class AlignProp(Online):
    """Logs the reward (mean and deviation over the rows) and the number of steps with a gradient."""

    differentiable = True

    def __init__(self, config: Config) -> None:
        self.config, self.dynamics = config, make_dynamics(config.dynamics)

    @property
    def referenced(self) -> bool:
        return self.config.base_steps > 0

    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Batch:
        """The prompts: pictures and gradients come from one and the same chain."""
        return batch

    def update(self, model: DiffusionModel, collected: Batch, part: int, tools: Tools) -> Loss:
        if self.config.base_steps and not tools.text:
            raise UserError("objective.base_steps is for runs with train.text_encoder=true: set it to 0")
        length, window = self.draw(tools.shared("window"))
        rewards, total = [], torch.zeros((), device=model.device)
        for rows in parts_of(collected, self.config.micro_batch):
            share = len(rows) / len(collected)
            found, loss = self.gradients(model, rows, length, window, share, tools)
            rewards.append(found)
            total += loss
        reward = torch.cat(rewards)
        terms = {"reward": reward.mean(), "reward_std": reward.std(unbiased=False)}
        return Loss(total=total / tools.scale, terms={**terms, "grad_steps": torch.tensor(float(window))})

    def draw(self, rng: torch.Generator) -> tuple[int, int]:
        """How many steps to take, and through how many of the last ones the gradient goes."""
        n, kind = self.config.steps, self.config.truncation
        most = n - self.config.base_steps
        if kind == "early_end":
            first = max(self.config.base_steps + 1, round(self.config.earliest * n))
            return int(torch.randint(first, n + 1, (), generator=rng)), 1
        if kind == "uniform":
            return n, int(torch.randint(1, most + 1, (), generator=rng))
        if kind == "normal":
            drawn = self.config.grad_steps + 5 * torch.randn((), generator=rng)
            return n, int(drawn.round().clamp(1, most))
        return n, most if kind == "full" else self.config.grad_steps

    def gradients(
        self, model: DiffusionModel, rows: Batch, length: int, window: int, share: float, tools: Tools
    ) -> tuple[Tensor, Tensor]:
        """Add the gradients of some rows, ``share`` of the batch; their rewards and their part of the scaled loss."""
        with torch.enable_grad():
            cond, uncond = conditions(model, rows.prompts, self.config.cfg_scale, tools.text)
        with torch.no_grad():
            generators, (start, end) = tools.generators(rows), self.chain(model, length)
            first = self.config.base_steps
            trajectory = rollout(
                model,
                cond,
                uncond=uncond,
                cfg_scale=self.config.cfg_scale,
                chain=(start[first:], end[first:]),
                dynamics=self.dynamics,
                latents=self.begin(model, rows, (start[:first], end[:first]), generators, tools) if first else None,
                generator=generators,
                grad_steps=window,
                deferred=True,
            )
        scores: list[Tensor] = []

        def loss(latents: Tensor) -> Tensor:
            reward = score(tools, pixels(model, latents), rows)
            scores.append(reward.detach())
            error = -reward if self.config.target is None else (reward - self.config.target).abs()
            return tools.scale * share * error.mean()

        total = torch.zeros((), device=model.device)
        copies = self.config.copies
        for chain in [trajectory, *(self.again(model, trajectory, i, tools, rows) for i in range(1, copies))]:
            value, at_end = end_gradient(chain.final, loss)
            found = backpropagate(model, chain, at_end / copies, conditions=tools.text)
            if tools.text:
                into_conditions(cond, found.cond)
                if uncond is not None:
                    into_conditions(uncond, found.uncond)
            total += value / copies
        return torch.stack(scores).mean(0), total

    def begin(
        self,
        model: DiffusionModel,
        rows: Batch,
        chain: tuple[Tensor, Tensor],
        generators: list[torch.Generator],
        tools: Tools,
    ) -> Tensor:
        """Where the first steps lead, with the conditions of the untrained text encoder."""
        with tools.reference():
            cond, uncond = conditions(model, rows.prompts, self.config.cfg_scale, text=False)
        begun = rollout(
            model,
            cond,
            uncond=uncond,
            cfg_scale=self.config.cfg_scale,
            chain=chain,
            dynamics=self.dynamics,
            generator=generators,
        )
        return begun.final

    def chain(self, model: DiffusionModel, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` steps of the schedule, of which the last leads to a clean end."""
        start, end = model.schedule.timesteps(self.config.steps)
        if length == self.config.steps:
            return start, end
        return start[:length], torch.cat([start[1:length], end.new_full((1,), -1)])

    @torch.no_grad()
    def again(self, model: DiffusionModel, first: Trajectory, copy: int, tools: Tools, rows: Batch) -> Trajectory:
        """The last step anew, from its end noised to where it began."""
        t = first.timesteps[-1].to(model.device).expand(len(first))
        draws = [
            torch.randn(first.final.shape[1:], generator=tools.shared("copy", copy, int(r))) for r in rows.extra["row"]
        ]
        x = model.schedule.add_noise(first.final, torch.stack(draws).to(first.final), t)
        return rollout(
            model,
            first.cond,
            uncond=first.uncond,
            cfg_scale=first.cfg_scale,
            chain=(first.timesteps[-1:], first.ends[-1:]),
            dynamics=self.dynamics,
            latents=x,
            generator=[tools.shared("step", copy, int(r)) for r in rows.extra["row"]],
            grad_steps=1,
            deferred=True,
        )
