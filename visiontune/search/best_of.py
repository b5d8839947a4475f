"""Best of N: N seeds for each picture, of which the reward picks one.

The random search of Ma et al., 2025, arXiv 2501.09732. The first seed is the picture's own, and the others do not
depend on N, so that more of them never find a lower reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visiontune.core import Request
from visiontune.schema import option
from visiontune.search.base import Best, Cost, Found, Search, Setting, nth


@dataclass(frozen=True, kw_only=True)
class Config(Search):
    """Options of best-of-N."""

    n: int = option(8, least=2, greatest=100_000, help="pictures that are drawn for each that is kept")

    def cost(self, at: Setting) -> Cost:
        return Cost(pictures=self.n, rows=self.n * at.rows, scores=self.n)

    def find(self, at: Setting, requests: Sequence[Request]) -> list[Found]:
        # The k-th of all requests come together: those of k = 0 are the batch that is drawn without search.
        asked = [nth(request, k) for k in range(self.n) for request in requests]
        scored = zip(asked, at.scored(asked), strict=True)
        best = [Best(*next(scored)[1], seed=one.seed) for one in requests]
        for number, (one, (picture, reward)) in enumerate(scored):
            best[number % len(requests)].see(picture, reward, seed=one.seed)
        return [one.found() for one in best]


def build(config: Config) -> Config:
    """The search."""
    return config
