"""Skip-Tuning: the long skips of a UNet count for less, the deepest one for least.

Ma et al., 2024, arXiv 2402.15170: each stage on the way up sees [x, rho_i d_i] with d_i what it is handed across. From
the deepest skip to the outermost one, rho_i goes in even steps from `bottom` to `top`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from visiontune.guidance import _skips
from visiontune.guidance._network import Network
from visiontune.guidance.base import Point, Shaping
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Shaping):
    """The two ends of the ramp, and how much of it acts."""

    scale: float = option(1.0, least=0, greatest=10, help="s of rho ** s, by which skips are scaled; 0 is not at all")
    bottom: float = option(0.82, least=0, greatest=2, help="rho of the deepest skip")
    top: float = option(1.0, least=0, greatest=2, help="rho of the outermost skip")

    @property
    def idle(self) -> bool:
        return super().idle or self.bottom == self.top == 1

    def shaping(
        self, network: Network, arguments: Mapping[str, Any], point: Point, side: str
    ) -> AbstractContextManager[Any]:
        rho = ramp(self.bottom, self.top, _skips.count(network, "skip_tuning"))
        factors = _skips.powers(rho, self.amount(point.levels, point.x))
        return _skips.scaled(_skips.taking(network, "skip_tuning"), factors)

    def check(self, network: Network) -> None:
        _skips.count(network, "skip_tuning")


def ramp(bottom: float, top: float, count: int) -> list[float]:
    """So many numbers in even steps from `bottom` to `top`, both included; one alone is `bottom`."""
    return [bottom + (top - bottom) * i / max(count - 1, 1) for i in range(count)]


def build(config: Config) -> Config:
    """The term."""
    return config
