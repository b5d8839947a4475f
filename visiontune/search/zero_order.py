"""Zero-order search: the starting noise of the best picture is perturbed, again and again.

Ma et al., 2025, arXiv 2501.09732, with perturbations that keep the noise a standard Gaussian,

    noise = sqrt(1 - radius^2) best + radius fresh,

so that what is drawn stays what the model was trained to draw; radius 1 is fresh noise, and so best-of-N. The best
picture is never given up for a worse one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from visiontune.core import Request
from visiontune.errors import UserError
from visiontune.schema import option
from visiontune.search._latents import diffusion
from visiontune.search.base import Best, Cost, Found, Search, Setting, nth


@dataclass(frozen=True, kw_only=True)
class Config(Search):
    """Options of zero-order search."""

    n: int = option(4, least=2, greatest=100_000, help="perturbations that are tried in each iteration")
    iterations: int = option(4, least=1, greatest=100_000, help="how often the noise of the best picture is perturbed")
    radius: float = option(
        0.4, above=0, greatest=1, help="share of fresh noise, by deviation; 1 keeps none of the best"
    )

    def check(self, at: Setting) -> None:
        if not hasattr(at.model, "start_noise"):
            raise UserError(
                f"zero_order perturbs the noise that a picture starts from, and '{at.model.source}' starts from masked "
                "tokens: take best_of"
            )

    def cost(self, at: Setting) -> Cost:
        pictures = 1 + self.n * self.iterations
        return Cost(pictures=pictures, rows=pictures * at.rows, scores=pictures)

    def find(self, at: Setting, requests: Sequence[Request]) -> list[Found]:
        best = [Best(*pair, seed=one.seed) for one, pair in zip(requests, at.scored(requests), strict=True)]
        pivots = [_noise(at, one) for one in requests]
        for begin in range(1, 1 + self.n * self.iterations, self.n):
            around, parents = list(pivots), [one.number for one in best]
            places = [(k, i) for k in range(begin, begin + self.n) for i in range(len(requests))]
            fresh = [nth(requests[i], k) for k, i in places]
            noises = [self.perturbed(around[i], _noise(at, one)) for (_, i), one in zip(places, fresh, strict=True)]
            tried = [replace(requests[i], noise=noise) for (_, i), noise in zip(places, noises, strict=True)]
            for (_, i), one, noise, pair in zip(places, fresh, noises, at.scored(tried), strict=True):
                if best[i].see(*pair, seed=one.seed, around=parents[i]):
                    pivots[i] = noise
        return [one.found() for one in best]

    def perturbed(self, noise: Tensor, fresh: Tensor) -> Tensor:
        """A standard Gaussian near `noise`, where both are."""
        return math.sqrt(1 - self.radius**2) * noise + self.radius * fresh


def _noise(at: Setting, request: Request) -> Tensor:
    return diffusion(at).start_noise(request, at.size)


def build(config: Config) -> Config:
    """The search."""
    return config
