"""Reward guidance: the clean picture that a step sees ahead goes up the gradient of a reward.

Universal guidance (Bansal et al., 2023, arXiv 2302.07121), after DPS (Chung et al., 2023, arXiv 2209.14687): the score
gets s g more, with g the gradient of r(decode(x_0-hat)) in x_t, that is eps -= sigma s g. Without a walk back through
the network (FreeDoM, Yu et al., 2023, arXiv 2303.09833) g is alpha / (alpha^2 + sigma^2) times the gradient in x_0-hat,
which it is for values of unit variance that know nothing of each other.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.guidance.base import Point, Pull, Run, Sides, Strength, dot
from visiontune.rewards.base import Reward, as_reward
from visiontune.rewards.loading import load
from visiontune.schema import option

# Samplers begin where hardly any signal is, and the way from there to the score has no end.
_LEAST_SIGNAL = 1e-3


@dataclass(frozen=True, kw_only=True)
class Config(Pull):
    """A gradient of any differentiable reward; through the network in one more call and a walk back."""

    scale: float = option(1.0, least=-1e9, greatest=1e9, help="s of eps - sigma s g; 0 is none and costs nothing")
    reward: Any = option(help="name of a differentiable reward, or {name: ..., its options}: `visiontune list rewards`")
    through: Literal["latent", "network"] = option(
        "latent", help="gradient in the clean picture that is seen ahead, or back through the network as well"
    )
    clip: float | None = option(
        1.0, above=0, greatest=1000, help="longest step, times that from the negative prompt's prediction; null for any"
    )
    repeats: int = option(1, least=1, greatest=100, help="gradient steps a call, s / repeats each; latent alone")
    prompt: str | None = option(None, help="what the reward is asked; null for the picture's own prompt")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.reward, str | Mapping) or callable(self.reward)):
            raise UserError(f"reward must be a name, or a mapping with a name, not {self.reward!r}")
        if self.repeats > 1 and self.through == "network":
            raise UserError("repeats is of gradient steps in the clean picture: set through to latent, or repeats to 1")

    @property
    def contrasts(self) -> bool:
        return self.clip is not None

    @property
    def rows(self) -> int:
        return int(self.through == "network")

    @property
    def scorer(self) -> Reward:
        """The reward."""
        if isinstance(self.reward, str | Mapping):
            return _loaded(json.dumps(self.reward, sort_keys=True))
        return as_reward(self.reward, getattr(self.reward, "name", type(self.reward).__name__))

    def check(self, network: Network) -> None:
        scorer = self.scorer
        if not scorer.differentiable:
            raise UserError(f"reward '{scorer.name}' has no gradient to guide by: take one that has, as pocket-clip")
        if scorer.groupwise:
            raise UserError(
                f"reward '{scorer.name}' compares pictures with each other: take one that scores each alone"
            )

    def begins(self, run: Run) -> None:
        model = run.modelled(self.name)
        if next(model.vae.parameters()).dtype == torch.float16:
            raise UserError("reward: gradients vanish in float16: set dtype to bf16 or fp32")
        if run.prompts is None and self.prompt is None:
            raise UserError(
                "reward: the prompts of the pictures are not known here: set its prompt, or give them to attach"
            )

    def pull(self, p: Tensor, u: Tensor | None, s: Strength, sides: Sides, point: Point) -> Tensor:
        assert point.schedule is not None
        alpha, sigma = (level.to(point.x) for level in point.schedule.levels(point.t, p.ndim))
        if self.through == "network":
            step = sigma.square() / alpha.clamp(min=_LEAST_SIGNAL) * s * self._back(sides, point)
        else:
            step = self._climbed(point.schedule.to_x_0(p, point.x, point.t), s, alpha, sigma, point)
        found = point.schedule.per_x_0(point.t, p.ndim).to(step) * step
        if self.clip is not None:
            assert u is not None
            far, most = p - u, torch.finfo(found.dtype).tiny
            room = self.clip * dot(far, far).sqrt()
            found = found * (room / dot(found, found).sqrt().clamp(min=most)).clamp(max=1)
        return found.to(p.dtype)

    def _back(self, sides: Sides, point: Point) -> Tensor:
        """The gradient of the reward in x_t."""
        assert point.schedule is not None
        with torch.enable_grad():
            x = point.x.detach().requires_grad_()
            clean = point.schedule.to_x_0(sides.at(x), x, point.t)
            return torch.autograd.grad(self._score(clean, point).sum(), x)[0]

    def _climbed(self, clean: Tensor, s: Strength, alpha: Tensor, sigma: Tensor, point: Point) -> Tensor:
        """How far the clean picture goes up the reward."""
        start = x = clean.detach()
        share = sigma.square() / (alpha.square() + sigma.square()) / self.repeats
        for _ in range(self.repeats):
            with torch.enable_grad():
                leaf = x.requires_grad_()
                (gradient,) = torch.autograd.grad(self._score(leaf, point).sum(), leaf)
            x = (leaf + share * s * gradient).detach()
        return x - start.detach()

    def _score(self, clean: Tensor, point: Point) -> Tensor:
        pixels = point.run.model.decode(clean) / 2 + 0.5
        # What overshoots is shown as clamped, and has the gradient of what it is.
        pixels = pixels + (pixels.clamp(0, 1) - pixels).detach()
        prompts: Sequence[str] = [self.prompt] * len(clean) if self.prompt is not None else point.run.prompts or ()
        return self.scorer(pixels, prompts)


@functools.lru_cache(maxsize=4)
def _loaded(spec: str) -> Reward:
    """The reward of a spec in JSON, loaded once for all steps and batches."""
    return load(json.loads(spec), "reward")


def build(config: Config) -> Config:
    """The term."""
    return config
