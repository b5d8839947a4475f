"""SLG: away from what the network predicts when some of its blocks are skipped.

Stability AI's reference of Stable Diffusion 3.5, 2024: p + s (c - worse), where the chosen blocks give what they were
given.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from visiontune.guidance._network import Network
from visiontune.guidance._taps import skipping
from visiontune.guidance.base import Perturbed
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Perturbed):
    """Skipped blocks, in one more call."""

    scale: float = option(2.8, least=-1000, greatest=1000, help="s of p + s (c - worse)")
    layers: str | list[str] = option(
        "mid", help="mid, all, numbers of blocks ([7, 8, 9]), or patterns of the names of blocks"
    )

    def worse(self, network: Network, arguments: Mapping[str, Any]) -> AbstractContextManager[Any]:
        return skipping(network.blocks(self.layers, "slg"), network.returned)

    def check(self, network: Network) -> None:
        network.blocks(self.layers, "slg")


def build(config: Config) -> Config:
    """The term."""
    return config
