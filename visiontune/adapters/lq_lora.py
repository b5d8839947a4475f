"""LQ-LoRA: training of the two thin factors that hold what the quantisation of each weight lost.

Guo et al., "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
arXiv 2311.12023, section 3.

    W = Q + s B0 A0,    W' = W + s (B A - B0 A0) = Q + s B A,    A = A0 + dA,  B = B0 + dB,  s = alpha / r

Q are the codes and s B0 A0 what `model.quantize_rank` keeps of their error, which is part of the base here and serves
every adapter. The trained dA and dB start at zero, so the start is that base bit for bit; and the change can be used on
the base in floating point, where it belongs as well. Where nothing was kept, as in a base of no codes, A0 is random and
B0 zero, as in LoRA; so are components beyond those that were kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from visiontune.adapters._layers import fan_in
from visiontune.adapters._low_rank import LAYERS, Difference
from visiontune.adapters._quantised import lost_of
from visiontune.adapters.base import Method
from visiontune.schema import option

__all__ = ["LAYERS", "Config", "build"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of LQ-LoRA; r (in + out) parameters for each linear layer."""

    rank: int = option(16, least=1, greatest=16384, help="r; of what was kept the largest r components are trained")
    alpha: float | None = option(
        None, above=0, greatest=1e6, help="strength: the change is multiplied by alpha / rank; default: rank"
    )

    @property
    def strength(self) -> float:
        """s in the module's equation."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """LQ-LoRA for the layers of one component."""
    return Method({name: Kept(config, layer) for name, layer in layers.items()})


class Kept(Difference):
    """A difference that starts at what a layer keeps beside its codes."""

    @torch.no_grad()
    def __init__(self, config: Config, layer: Any) -> None:
        super().__init__(layer, config.rank, config.strength)
        bound = 1 / math.sqrt(fan_in(layer))
        self.down0.uniform_(-bound, bound)
        if (lost := lost_of(layer)) is not None:
            (down, up), root = lost, math.sqrt(config.strength)
            kept = min(config.rank, len(down))
            # The largest components stand first.
            self.down0[:kept] = down[:kept] / root
            self.up0[:, :kept] = up[:, :kept] / root
