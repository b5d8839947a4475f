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

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from visiontune.core import Batch, Loss
from visiontune.diffusion._window import gradient_window, require_effect
from visiontune.diffusion.pathwise import backpropagate, end_gradient, into_conditions
from visiontune.diffusion.trajectory import Start, Trajectory, Window, require_no_memory, rollout
from visiontune.diffusion.transition import kernel
from visiontune.errors import UserError
from visiontune.objectives._online import Stepped, SteppedConfig, conditions, parts_of, pixels, reward_terms, score
from visiontune.objectives.base import Needs, Tools
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel

# Standard deviation of the number of steps for ``normal``, as in AlignProp's code.
SPREAD = 5.0


@dataclass(frozen=True, kw_only=True)
class Config(SteppedConfig):
    """Options of reward back-propagation."""

    steps: int = option(25, least=1, greatest=100_000, help="N, sampling steps of a rollout")
    truncation: Literal["uniform", "normal", "fixed", "full", "early_end"] = option(
        "uniform", help="steps with a gradient: random (uniform, normal), grad_steps, all, or the last of a cut chain"
    )
    grad_steps: int = option(
        1, least=1, greatest=100_000, help="K for fixed; the least K for uniform, its mean for normal"
    )
    earliest: float = option(0.5, least=0, below=1, help="share of the chain that is done at least before an early end")
    base_steps: int = option(
        0, least=0, greatest=100_000, help="first steps that see the prompt as the untrained text encoder reads it"
    )
    copies: int = option(
        1,
        least=1,
        greatest=1024,
        help="DRaFT-LV: noised copies of the end over which a last step's gradient is averaged",
    )
    target: float | None = option(
        None, least=-1e9, greatest=1e9, help="pull the reward to this value instead of up without bound"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_steps >= self.steps:
            raise ValueError("base_steps must be less than steps")
        if self.grad_steps > self.steps - self.base_steps:
            raise ValueError("grad_steps must be at most steps, less base_steps")
        if self.copies > 1 and (self.truncation, self.grad_steps) != ("fixed", 1):
            raise ValueError(
                "copies average the gradient of the last step: set truncation to fixed and grad_steps to 1"
            )


def build(config: Config) -> AlignProp:
    """The objective that ``config`` describes."""
    return AlignProp(config)


class AlignProp(Stepped):
    """Logs the reward (mean and deviation over all processes' rows) and the number of steps with a gradient."""

    config: Config

    @property
    def needs(self) -> Needs:
        return replace(super().needs, differentiable=True, reference=self.config.base_steps > 0)

    def check_reward(self, reward: Any) -> None:
        """Besides, refuse one that micro-batches would falsify."""
        super().check_reward(reward)
        if reward.groupwise and self.config.micro_batch is not None:
            raise UserError(
                f"reward '{reward.name}' compares the pictures of a batch with each other, which objective.micro_batch "
                "would tear apart: set it to null, or take another reward"
            )

    def check(self, model: DiffusionModel, reward: Any) -> None:
        """Besides, refuse what an unlucky draw of the window would refuse in the middle of a run."""
        super().check(model, reward)
        require_no_memory(self.guidance(model))
        for length, window in self.shortest():
            chain = self.chain(model, length)
            require_effect(
                gradient_window(window, length), chain[0], *kernel(model.schedule, *chain, self.dynamics)[:2]
            )

    def check_text(self, trained: bool) -> None:
        """Besides, refuse first steps of an untrained encoder where none is trained."""
        super().check_text(trained)
        if self.config.base_steps and not trained:
            raise UserError("objective.base_steps is for runs that train text encoders (train.parts): set it to 0")

    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Batch:
        """The prompts: pictures and gradients come from one and the same chain."""
        return batch

    def update(self, model: DiffusionModel, collected: Batch, part: int, tools: Tools) -> Loss:
        """The chains of a batch under the present weights, in micro-batches, and their gradients."""
        length, window = self.draw(tools.shared("window"))
        scores, total = [], torch.zeros((), device=model.device)
        for rows in parts_of(collected, self.config.micro_batch):
            share = len(rows) / len(collected)
            found, loss = self.gradients(model, rows, length, window, share, tools)
            scores.append(found)
            total += loss
        terms = reward_terms(tools, {name: torch.cat([part[name] for part in scores]) for name in scores[0]})
        return Loss(total=total / tools.scale, terms={**terms, "grad_steps": total.new_tensor(window)})

    def draw(self, rng: torch.Generator) -> tuple[int, int]:
        """How many steps to take, and through how many of the last ones the gradient goes."""
        n, k, kind = self.config.steps, self.config.grad_steps, self.config.truncation
        most = n - self.config.base_steps
        if kind == "early_end":
            return int(torch.randint(self._first(), n + 1, (), generator=rng)), 1
        if kind == "uniform":
            return n, int(torch.randint(k, most + 1, (), generator=rng))
        if kind == "normal":
            drawn = 0
            while not 1 <= drawn <= most:
                drawn = round(k + SPREAD * float(torch.randn((), generator=rng)))
            return n, drawn
        return n, most if kind == "full" else k

    def shortest(self) -> list[tuple[int, int]]:
        """Of what :meth:`draw` may give, the shortest window of each length."""
        n, k, kind = self.config.steps, self.config.grad_steps, self.config.truncation
        if kind == "early_end":
            return [(length, 1) for length in range(self._first(), n + 1)]
        return [(n, {"full": n - self.config.base_steps, "normal": 1}.get(kind, k))]

    def _first(self) -> int:
        """The least number of steps before an early end, the end among them."""
        return max(1, self.config.base_steps + 1, round(self.config.earliest * self.config.steps))

    def gradients(
        self, model: DiffusionModel, rows: Batch, length: int, window: int, share: float, tools: Tools
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradients of some rows, ``share`` of the batch; their scores and their part of the scaled loss."""
        guidance = self.guidance(model)
        with torch.enable_grad():
            cond, uncond = conditions(model, rows.prompts, guidance, tools.text)
        with torch.no_grad():
            generators, (start, end) = tools.generators(rows), self.chain(model, length)
            first = self.config.base_steps
            trajectory = rollout(
                model,
                cond,
                uncond=uncond,
                guidance=guidance,
                chain=(start[first:], end[first:]),
                dynamics=self.dynamics,
                start=Start(
                    latents=self.begin(model, rows, (start[:first], end[:first]), generators, tools) if first else None,
                    generator=generators,
                ),
                window=Window(steps=window, deferred=True),
            )
        scores: list[dict[str, Tensor]] = []

        def loss(latents: Tensor) -> Tensor:
            found = score(tools, pixels(model, latents), rows)
            scores.append({name: value.detach() for name, value in found.items()})
            reward = found["reward"]
            error = -reward if self.config.target is None else (reward - self.config.target).abs()
            return tools.scale * share / self.config.copies * error.mean()

        walks, total = [], torch.zeros((), device=model.device)
        for copy in range(self.config.copies):
            chain = self.again(model, trajectory, tools.generators(rows, "copy", copy)) if copy else trajectory
            value, at_end = end_gradient(chain.final, loss)
            walks.append(backpropagate(model, chain, at_end, conditions=tools.text))
            total += value
        into_conditions(cond, *(walk.cond for walk in walks))
        if uncond is not None:
            into_conditions(uncond, *(walk.uncond for walk in walks))
        return {name: torch.stack([one[name] for one in scores]).mean(0) for name in scores[0]}, total

    def begin(
        self,
        model: DiffusionModel,
        rows: Batch,
        chain: tuple[Tensor, Tensor],
        generators: list[torch.Generator],
        tools: Tools,
    ) -> Tensor:
        """Where the first steps lead, with the conditions of the untrained text encoder."""
        guidance = self.guidance(model)
        with tools.reference():
            cond, uncond = conditions(model, rows.prompts, guidance, text=False)
        begun = rollout(
            model,
            cond,
            uncond=uncond,
            guidance=guidance,
            chain=chain,
            dynamics=self.dynamics,
            start=Start(generator=generators),
        )
        return begun.final

    def chain(self, model: DiffusionModel, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` steps of the schedule, of which the last leads to a clean end."""
        start, end = model.chain(self.config.steps, model.latent_shape())
        if length == self.config.steps:
            return start, end
        return start[:length], torch.cat([start[1:length], end.new_full((1,), -1)])

    @torch.no_grad()
    def again(self, model: DiffusionModel, first: Trajectory, generators: list[torch.Generator]) -> Trajectory:
        """The last step anew, from its end noised to where it began."""
        noise = randn_tensor(first.final.shape, generator=generators, device=first.final.device)
        t = first.timesteps[-1].to(model.device).expand(len(first))
        return rollout(
            model,
            first.cond,
            uncond=first.uncond,
            guidance=first.guidance,
            chain=(first.timesteps[-1:], first.ends[-1:]),
            dynamics=self.dynamics,
            start=Start(latents=model.schedule.add_noise(first.final, noise, t), generator=generators),
            window=Window(steps=1, deferred=True),
        )
