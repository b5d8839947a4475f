"""STG: away from what the network predicts when attention, or a whole residual block, of some layers is skipped.

Hyung et al., 2024, arXiv 2411.18664, of videos: p + s (c - worse). Where attention is skipped, every token of the layer
gets its own value, words too where they stand among the tokens; where the residual is, the block gives what it was
given.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from visiontune.guidance._network import Network
from visiontune.guidance._taps import Attention, attending, skipping
from visiontune.guidance.base import Perturbed
from visiontune.guidance.pag import identity
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Perturbed):
    """Skipped layers, in one more call."""

    scale: float = option(1.0, least=-1000, greatest=1000, help="s of p + s (c - worse)")
    skip: Literal["attention", "residual"] = option(
        "attention", help="attention: each token gets its own value (STG-A); residual: blocks do nothing (STG-R)"
    )
    layers: str | list[int | str] = option(
        "mid", help="mid, all, numbers of blocks, or patterns of the names of attention layers, or of blocks"
    )

    def worse(self, network: Network, arguments: Mapping[str, Any]) -> AbstractContextManager[Any]:
        if self.skip == "residual":
            return skipping(network.blocks(self.layers, "stg"), network.returned)
        return attending(network.attention(self.layers, "stg"), "stg", _own_value)

    def check(self, network: Network) -> None:
        if self.skip == "residual":
            network.blocks(self.layers, "stg")
        else:
            network.attention(self.layers, "stg")


def _own_value(name: str) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **call: Any) -> Tensor:
        return identity(q, k, v, mask, slice(0, 0), **call)

    return attend


def build(config: Config) -> Config:
    """The term."""
    return config
