"""PRDP: the difference of two pictures' rewards is predicted by the difference of their log-likelihood ratios.

Deng et al., "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models", 2024,
arXiv 2402.08714. The optimum of E[r] - beta KL(pi || pi_ref) over whole chains is pi_ref exp(r / beta) / Z(prompt), so
that two chains a and b of one prompt have

    rhat^a - rhat^b = (r^a - r^b) / beta,    rhat = sum over t of rhat_t,
    rhat_t = log pi(x_{t-1} | x_t) - log pi_ref(x_{t-1} | x_t)

The loss of a pair is the square of what is missing,

    l = max(d(rhat)^2, d(clipped rhat)^2),   d(rhat) = (rhat^a - rhat^b) - (r^a - r^b) / beta
    clipped rhat_t in rhat_t^old +- clip

with rhat^old of the weights that drew the chains; its mean is taken over the pairs of a prompt with r^a > r^b. Ties say
nothing. The square couples all steps and rows, but sees only the matrix of log-probabilities: its gradient is found
there and sent through the network one step of a micro-batch at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from visiontune.core import Batch, Loss
from visiontune.diffusion.replay import backpropagate_scores, reference, replay, rounding
from visiontune.diffusion.trajectory import Trajectory
from visiontune.errors import UserError
from visiontune.objectives._advantages import NOISE, indistinct
from visiontune.objectives._draw import draw_scored
from visiontune.objectives._online import GroupConfig, Stepped, SteppedConfig, require_precise
from visiontune.objectives.base import Needs, Tools
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel

_ROUNDING = 1e-5  # of a mean log-probability that is computed twice


@dataclass(frozen=True, kw_only=True)
class Config(GroupConfig, SteppedConfig):
    """Options of PRDP."""

    group: int = option(8, least=2, greatest=65536, help="B, pictures of each prompt; all pairs of them are compared")
    updates: int = option(4, least=1, greatest=65536, help="K, optimiser steps for each rollout")
    steps: int = option(25, least=1, greatest=100_000, help="T, sampling steps of a rollout")
    cfg_scale: float = option(5.0, least=-1000, greatest=1000, help="guidance of rollout and training; 1 for none")
    dynamics: str | dict[str, Any] = option(
        {"name": "ddim", "eta": 1.0}, help="how the sampler steps; it must add noise"
    )
    beta: float = option(
        3e-5, above=0, greatest=1e6, help="weight of the KL to the base, in units of the reward and of over_steps"
    )
    clip: float | None = option(
        1e-4, above=0, greatest=1000, help="how far rhat_t may move from the rollout's; null for no clipping"
    )
    over_steps: Literal["mean", "sum"] = option(
        "mean", help="rhat is the mean over the steps, as in the authors' listing, or the sum, as in their text"
    )
    over_latents: Literal["mean", "sum"] = option(
        "mean", help="a log-probability is the mean over the latent's values, or the sum: the density itself"
    )


def build(config: Config) -> PRDP:
    """The objective that ``config`` describes."""
    return PRDP(config)


@dataclass(frozen=True, kw_only=True, eq=False)
class Collected:
    """A rollout of ``b`` rows and ``k`` scored steps.

    Attributes:
        trajectories: of a micro-batch each.
        old, base: ``[b, k]`` log-probabilities under the weights that drew it, and without adapters.
        rewards, prompts: ``[b]`` each.
        terms: what the log says of the rollout.
    """

    trajectories: list[Trajectory]
    old: Tensor
    base: Tensor
    rewards: Tensor
    prompts: Tensor
    terms: dict[str, Tensor]


def matched(rewards: Tensor, prompts: Tensor, noise: float = NOISE) -> Tensor:
    """Pairs (a, b) of one prompt with r^a > r^b by more than rounding, bool ``[b, b]``."""
    return (prompts[:, None] == prompts[None]) & (rewards[:, None] - rewards[None] > indistinct(rewards, noise))


def errors(implied: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """``((rhat^a - rhat^b) - (r^a - r^b) / beta)^2`` of all pairs, ``[b, b]``.

    Args:
        implied: rhat ``[b]``. rewards: ``[b]``.
    """
    missing = implied - rewards / beta
    return (missing[:, None] - missing[None]).square()


class PRDP(Stepped):
    """Logs the reward (mean, deviation), the agreement of implied and true rewards, KL, clipped share and ties."""

    likelihoods = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._precise = self.updates == 1

    @property
    def needs(self) -> Needs:
        return replace(super().needs, text=False, reference=True)

    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Collected:
        trajectories, rewards, terms = draw_scored(self, model, batch, tools, self.config.over_latents)
        return Collected(
            trajectories=trajectories,
            old=torch.cat([_scored(t).to(model.device) for t in trajectories]),
            base=torch.cat([reference(model, t, tools.reference()) for t in trajectories]),
            rewards=rewards,
            prompts=batch.data["prompt"],
            terms=terms,
        )

    def update(self, model: DiffusionModel, collected: Collected, part: int, tools: Tools) -> Loss:
        with torch.no_grad():
            now = torch.cat([replay(model, t) for t in collected.trajectories])
        if part == 0:
            self._require_start(now, collected)
        if self.config.clip is not None and not self._precise:
            require_precise(rounding(model, collected.trajectories[0]), self.config.clip, self.updates)
            self._precise = True
        found = (now - collected.base, collected.old - collected.base, collected.rewards, collected.prompts)
        implied, old, rewards, prompts = (tools.gather(value).cpu() for value in found)
        # A step's clip range may be 1e-9 of the rewards' difference over beta.
        implied, old, rewards = implied.double(), old.double(), rewards.double()
        implied.requires_grad_()
        with torch.enable_grad():
            total = self.loss(implied, old, rewards, prompts)
        (gradient,) = torch.autograd.grad(total, implied)
        own = gradient[tools.rank * len(now) : (tools.rank + 1) * len(now)]
        # The run averages over processes, and this loss is a mean over all of them already.
        weights = (own * tools.world * tools.scale).split([len(t) for t in collected.trajectories])
        for trajectory, weight in zip(collected.trajectories, weights, strict=True):
            backpropagate_scores(model, trajectory, weight.to(now))
        terms = self.terms(implied.detach(), old, rewards, prompts)
        on_device = {name: value.to(now.device, torch.float32) for name, value in terms.items()}
        return Loss(total=total.detach().to(now.device, torch.float32), terms={**collected.terms, **on_device})

    def loss(self, implied: Tensor, old: Tensor, rewards: Tensor, prompts: Tensor) -> Tensor:
        """The mean over the pairs of ``max(l, clipped l)``; 0 where there is none.

        Args:
            implied, old: ``[b, k]`` rhat_t, now and when it was drawn. rewards, prompts: ``[b]``.
        """
        beta, pairs = self.config.beta, matched(rewards, prompts, self.config.reward_noise)
        worst = errors(self._over_steps(implied), rewards, beta)
        if self.config.clip is not None:
            near = implied.clamp(old - self.config.clip, old + self.config.clip)
            worst = torch.maximum(worst, errors(self._over_steps(near), rewards, beta))
        return torch.where(pairs, worst, 0).sum() / pairs.sum().clamp(min=1)

    def terms(self, implied: Tensor, old: Tensor, rewards: Tensor, prompts: Tensor) -> dict[str, Tensor]:
        """What the log says of a step; arguments as for :meth:`loss`."""
        same = prompts[:, None] == prompts[None]
        others = same.sum(1) - 1
        pairs, clip = others.sum().clamp(min=1), self.config.clip or float("inf")
        share = same.to(rewards) / same.sum(1, keepdim=True)
        given, true = (v - share @ v for v in (self._over_steps(implied), rewards))
        spread = (given.square().sum() * true.square().sum()).sqrt()
        return {
            "agreement": torch.where(spread > 0, (given * true).sum() / spread, 0),
            "kl": implied.sum(1).mean(),
            "clipped": ((implied - old).abs() > clip).to(rewards).mean(),
            "ties": (others.sum() - 2 * matched(rewards, prompts, self.config.reward_noise).sum()) / pairs,
        }

    def _over_steps(self, implied: Tensor) -> Tensor:
        return implied.sum(1) if self.config.over_steps == "sum" else implied.mean(1)

    def _require_start(self, now: Tensor, collected: Collected) -> None:
        """Refuse a rollout whose log-probabilities are not met again while the weights are the same."""
        first = collected.trajectories[0]
        values = first.final[0].numel() if first.reduce == "sum" else 1
        off, allowed = (now - collected.old).abs().amax(0), _ROUNDING * values
        if bool((off > allowed).any()):
            worst = int(off.argmax())
            t = first.timesteps[first.scored][worst]
            raise UserError(
                f"the log-probability of step {worst} (t = {float(t):g}) differs by {float(off[worst]):.2g} when it is "
                "computed again with the same weights: set train.precision=no, and switch off what is random in the "
                "model"
            )


def _scored(trajectory: Trajectory) -> Tensor:
    assert trajectory.log_probs is not None
    return trajectory.log_probs[:, trajectory.scored.to(trajectory.log_probs.device)]
