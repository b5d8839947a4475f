"""Feynman-Kac steering: K noisy samples go together, and those that promise little are given up for copies of others.

Singhal et al., 2025, arXiv 2501.06848: sequential Monte Carlo whose target is the sampler's distribution times
exp(scale reward). At chosen steps each particle is weighed by the reward of the clean picture that the network expects
of it, and a group is resampled where its weights have become uneven. Copies part by the noise of the steps after, so
the sampler must add some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from visiontune.core import Request
from visiontune.diffusion.dynamics import make_dynamics
from visiontune.diffusion.replay import micro_batches
from visiontune.diffusion.trajectory import Chain, Start, rollout
from visiontune.errors import UserError
from visiontune.guidance.base import check_window
from visiontune.models.pipeline import own_generator
from visiontune.schema import option
from visiontune.search._latents import Judge, conditions, diffusion, pictures_of
from visiontune.search._particles import Particles, Potential
from visiontune.search._steer import Steered, Walk, steer
from visiontune.search.base import Cost, Found, Search, Setting, nth


@dataclass(frozen=True, kw_only=True)
class Config(Search):
    """Options of Feynman-Kac steering."""

    n: int = option(4, least=2, greatest=10_000, help="particles of each picture, K")
    scale: float = option(10.0, least=0, greatest=1e6, help="lambda of exp(lambda reward); 0 steers nothing")
    potential: Potential = option(
        "difference",
        help="what a particle is weighed by on the way: how its reward has changed, the highest that it had, or their "
        "sum",
    )
    every: int = option(5, least=1, greatest=100_000, help="steps from one weighing to the next")
    window: tuple[float, float] = option(
        (0.0, 1.0), least=0, greatest=1, help="levels of noise, both included, between which particles are weighed"
    )
    least: float = option(
        0.5, least=0, greatest=1, help="share of effective particles below which a picture's are resampled; 0 is never"
    )
    keep: Literal["best", "drawn"] = option(
        "best", help="of the finished particles: the one of the highest reward, or one drawn by weight"
    )
    dynamics: str | dict[str, Any] = option(
        {"name": "ddim", "eta": 1.0}, help="how the sampler steps: a name, or {name: ddim, eta: 1.0}"
    )

    def __post_init__(self) -> None:
        check_window(self.window)
        dynamics = make_dynamics(self.dynamics)
        if not dynamics.stochastic:
            raise UserError(
                f"dynamics '{dynamics.name}' adds no noise, so copies of a particle would stay alike: {dynamics.remedy}"
            )

    def check(self, at: Setting) -> None:
        if not hasattr(at.model, "chain"):
            raise UserError(f"fk weighs particles by their noise, and '{at.model.source}' has none: take best_of")
        if at.scheduler != "model":
            raise UserError(
                f"fk samples by its own dynamics: leave scheduler={at.scheduler} out, or take best_of or zero_order"
            )
        make_dynamics(self.dynamics).check(diffusion(at).schedule.prediction)
        if not self._visits(at, self._chain(at)):
            raise UserError(
                f"fk weighs particles every {self.every} steps at levels of noise {list(self.window)}, which is at "
                f"none of {at.steps} steps: lower every, or widen window"
            )

    def cost(self, at: Setting) -> Cost:
        scores = self.n * (len(self._visits(at, self._chain(at))) + 1) + 1
        return Cost(pictures=self.n + 1, rows=(self.n + 1) * at.rows, scores=scores)

    def find(self, at: Setting, requests: Sequence[Request]) -> list[Found]:
        together = max(1, at.batch_size // self.n)
        parts = micro_batches(len(requests), together)
        return [found for rows in parts for found in self._together(at, requests[rows])]

    def _together(self, at: Setting, requests: Sequence[Request]) -> list[Found]:
        asked = [nth(one, k) for one in requests for k in range(self.n)]
        # A seed that no particle has.
        generators = [own_generator(nth(one, self.n)) for one in requests]
        judge = Judge(at, asked)
        steered = steer(
            self._walk(at, asked, requests, self.n),
            Particles(len(requests), self.n, potential=self.potential, scale=self.scale),
            judge,
            visits=self._visits(at, self._chain(at)),
            least=self.least,
            generators=generators,
        )
        plain = pictures_of(at, self._plain(at, requests))
        plain_rewards = at.score(plain, requests)
        found = []
        for i, picked in enumerate(self._picked(steered, generators)):
            rows = slice(i * self.n, (i + 1) * self.n)
            found.append(
                Found(
                    picture=judge.pictures[rows.start + picked],
                    reward=float(steered.rewards[i, picked]),
                    plain=plain[i],
                    plain_reward=plain_rewards[i],
                    record={"kept": picked, **_record(steered, i, asked[rows])},
                )
            )
        return found

    def _walk(self, at: Setting, asked: Sequence[Request], requests: Sequence[Request], copies: int) -> Walk:
        """The rows `asked`, so many in turn for each of the requests, on their way."""
        model, generators = diffusion(at), [own_generator(one) for one in asked]
        latents = [model.start_noise(one, at.size, own) for one, own in zip(asked, generators, strict=True)]
        rows = torch.arange(len(requests)).repeat_interleave(copies)
        cond, uncond = conditions(at, requests)
        return Walk(
            model=model,
            cond=cond[rows],
            uncond=None if uncond is None else uncond[rows],
            chain=self._chain(at),
            guidance=at.guidance,
            dynamics=make_dynamics(self.dynamics),
            start=Start(latents=torch.stack(latents), generator=generators),
            batch_size=at.batch_size,
        )

    def _plain(self, at: Setting, requests: Sequence[Request]) -> Tensor:
        """The end of the sampler's own way."""
        walk = self._walk(at, requests, requests, 1)
        return rollout(
            walk.model,
            walk.cond,
            uncond=walk.uncond,
            guidance=walk.guidance,
            chain=walk.chain,
            dynamics=walk.dynamics,
            start=walk.start,
        ).final

    def _picked(self, steered: Steered, generators: Sequence[torch.Generator]) -> list[int]:
        """The particle of each group that is kept."""
        if self.keep == "best":
            return steered.rewards.argmax(1).tolist()
        uniform = [torch.rand((), generator=one, dtype=torch.float64) for one in generators]
        reached = steered.weights.cumsum(1)
        places = torch.stack(uniform)[:, None] * reached[:, -1:]
        return torch.searchsorted(reached, places, right=True).flatten().tolist()

    def _chain(self, at: Setting) -> Chain:
        model = diffusion(at)
        return model.chain(at.steps, model.latent_shape(*at.size))

    def _visits(self, at: Setting, chain: Chain) -> list[int]:
        """Numbers of the steps before which particles are weighed: every so many, but not in pure noise."""
        low, high = self.window
        levels = (chain[0].clamp(min=0) / diffusion(at).schedule.num_train_timesteps).tolist()
        return [i for i in range(self.every, len(levels), self.every) if low <= levels[i] <= high]


def build(config: Config) -> Config:
    """The search."""
    return config


def _record(steered: Steered, group: int, asked: Sequence[Request]) -> dict[str, Any]:
    """What became of the particles of a group: the seeds of their noise, their rewards, and whom they went on from."""
    ends = zip(asked, steered.rewards[group].tolist(), strict=True)
    visits = [
        {
            "step": step,
            "rewards": rewards[group].tolist(),
            "from": None if ancestors is None else ancestors[group].tolist(),
        }
        for step, rewards, ancestors in steered.visits
    ]
    return {"drawn": [{"seed": one.seed, "reward": reward} for one, reward in ends], "weighed": visits}
