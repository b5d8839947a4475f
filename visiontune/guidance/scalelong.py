"""ScaleLong: the long skips of a UNet are scaled by a power of kappa that grows with their depth.

Huang et al., 2023, arXiv 2310.13545: skip i of N, of which the first is the outermost, is scaled by kappa ** (i - 1).
The paper trains networks in this way; here one that was trained without it samples so.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from visiontune.guidance import _skips
from visiontune.guidance._network import Network
from visiontune.guidance.base import Point, Shaping, Strength
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Shaping):
    """Constant scaling."""

    NEUTRAL = 1.0

    # Half, times two where the strength changes by level, is the most that leaves kappa above zero.
    scale: float = option(0.95, least=0.5, greatest=1, help="kappa of kappa ** (i - 1), by which skip i is scaled")
    alike: bool = option(False, help="scale all skips by kappa itself, the outermost one too")

    def shaping(
        self, network: Network, arguments: Mapping[str, Any], point: Point, side: str
    ) -> AbstractContextManager[Any]:
        kappa, deep = self.amount(point.levels, point.x), _skips.count(network, "scalelong")
        exponents = [1] * deep if self.alike else [*range(deep)][::-1]
        return _skips.scaled(_skips.taking(network, "scalelong"), [_power(kappa, one) for one in exponents])

    def check(self, network: Network) -> None:
        _skips.count(network, "scalelong")


def _power(kappa: Strength, exponent: int) -> Strength:
    found: Tensor | float = kappa**exponent
    return found


def build(config: Config) -> Config:
    """The term."""
    return config
