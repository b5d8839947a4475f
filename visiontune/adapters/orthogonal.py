"""Orthogonal Adaptation: LoRA whose inputs' directions are nobody else's, so that changes learnt apart can be added up.

Po, Yang, Aberman, Wetzstein, "Orthogonal Adaptation for Modular Customization of Diffusion Models", CVPR 2024,
arXiv 2312.02432, section 4.

    W' = W + B A,    A = rows [s r, (s + 1) r) of an orthogonal basis Q [slots r, in],    B [out, r] trained from zero

A is held. Q is the same in every run: drawn from ``seed``, one for all layers of as many inputs. The rows of two slots
are orthogonal, A_i A_j^T = 0, and so are the changes: <B_i A_i, B_j A_j> = 0, whatever was learnt. Of an input, each
change sees a part of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.adapters._layers import fan_in, masters
from visiontune.adapters._low_rank import LAYERS, LowRank
from visiontune.adapters.base import Method
from visiontune.errors import UserError
from visiontune.schema import option

__all__ = ["LAYERS", "Config", "build"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of Orthogonal Adaptation; r out parameters for each linear layer.

    Runs that are to be added up differ in ``slot`` and in nothing else of these.
    """

    rank: int = option(16, least=1, greatest=16384, help="r; in a layer of few inputs, what goes into a slot of them")
    slots: int = option(8, least=1, greatest=4096, help="how many runs share the basis")
    slot: int = option(0, least=0, greatest=4095, help="which of them this is, from 0")
    seed: int = option(0, least=0, greatest=2**31 - 1, help="of the basis")

    def __post_init__(self) -> None:
        if self.slot >= self.slots:
            raise UserError(f"slot={self.slot} is none of slots={self.slots}: they count from 0")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """Orthogonal Adaptation of the layers of one component.

    Raises:
        UserError: a layer has fewer inputs than there are slots.
    """
    for name, layer in layers.items():
        if fan_in(layer) < config.slots:
            raise UserError(
                f"adapter.slots: '{name}' has {fan_in(layer)} inputs, which {config.slots} slots cannot share: "
                "lower slots, or leave the layer out of targets"
            )
    return Method({name: Slot(config, layer) for name, layer in layers.items()})


@functools.lru_cache(maxsize=64)
def basis(config: Config, inputs: int) -> Tensor:
    """Rows of this run's slot for layers of so many inputs, ``[r, inputs]``, orthonormal, in float64 on the CPU."""
    rank = min(config.rank, inputs // config.slots)
    rng = torch.Generator().manual_seed(config.seed)
    q, _ = torch.linalg.qr(torch.randn(inputs, config.slots * rank, generator=rng, dtype=torch.float64))
    return q.T[config.slot * rank :][:rank]


class Slot(LowRank):
    """``up`` (B) [out, r] beside the held ``down`` (A) [groups r, ...], which all groups of a convolution share."""

    down: Tensor

    def __init__(self, config: Config, layer: Any) -> None:
        super().__init__(layer)
        weight, place = layer.weight, masters(layer)
        rows = basis(config, fan_in(layer))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], len(rows), **place))
        self.register_buffer("down", rows.repeat(self.groups, 1).view(-1, *weight.shape[1:]).to(**place))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.down, self.up

    def tensors(self) -> dict[str, Tensor]:
        return {"up": self.up, "down": self.down}
