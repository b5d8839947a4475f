"""LoRA-SB: a small trained matrix between two frozen frames, those of the first step of full fine-tuning.

Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning", arXiv 2411.19557.

    W' = W + B R A,    -sign(G) = U S V^T,    B = U_r,  A = V_r^T,  R = eta S_r at the start

G is the mean gradient of the weight; -eta sign(G) is Adam's first step with learning rate eta, which the paper starts
from. By default eta is 0: the frames are those of that step and the start is the base. Since B and A are orthonormal,
the gradient of R is that of the weight in the frames, whatever its scale.

Until the adapter is prepared the frames are the singular vectors of the weight, as in LoRA-XS (arXiv 2405.17604).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.adapters._evidence import Evidence
from visiontune.adapters._layers import masters
from visiontune.adapters._low_rank import LAYERS, LowRank, full_rank, matrices
from visiontune.adapters._method import must_start
from visiontune.adapters.base import Method
from visiontune.schema import option

__all__ = ["LAYERS", "Config", "build"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of LoRA-SB; r^2 parameters for each layer (each group of a convolution)."""

    rank: int = option(64, least=1, greatest=16384, help="r, at most the smaller side of a weight")
    first_step: float = option(
        0.0, least=0, greatest=100, help="eta, length of the step to start from, in each entry; 0: start at the base"
    )
    batches: int = option(16, least=1, greatest=1_000_000, help="how many batches the gradient is averaged over")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """LoRA-SB for the layers of one component, with LoRA-XS's frames until it is prepared."""
    return LoRASB(config, layers)


class LoRASB(Method):
    """The cores of one component's layers."""

    plans = True

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        super().__init__({name: Core(config.rank, layer) for name, layer in layers.items()})
        self.config = config

    def prepare(self, evidence: Evidence) -> None:
        """Take the frames of the first step."""
        for name, gradient in evidence.gradients().items():
            adapter = self.adapters[name]
            assert isinstance(adapter, Core)
            adapter.start(matrices(evidence.layers[name], -gradient.sign()), self.config.first_step)


class Core(LowRank):
    """``core`` (R) [groups, r, r] between ``left`` (B) [out, r] and ``right`` (A) [groups r, ...]."""

    left: Tensor
    right: Tensor

    def __init__(self, rank: int, layer: Any) -> None:
        super().__init__(layer)
        weight, place = layer.weight, masters(layer)
        self.rank = min(rank, full_rank(layer))
        self.register_buffer("left", torch.zeros(weight.shape[0], self.rank, **place))
        self.register_buffer("right", torch.zeros(self.groups * self.rank, *weight.shape[1:], **place))
        self.core = nn.Parameter(torch.zeros(self.groups, self.rank, self.rank, **place))
        if must_start():
            self.start(matrices(layer, weight), 0.0)

    @torch.no_grad()
    def start(self, change: Tensor, length: float) -> None:
        """Take the frames of ``change`` [groups, out / groups, d], and ``length`` times its best approximation."""
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        self.left.copy_(u[:, :, : self.rank].reshape(self.left.shape))
        self.right.copy_(v[:, : self.rank].reshape(self.right.shape))
        self.core.copy_(length * torch.diag_embed(s[:, : self.rank]))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B R."""
        left = self.left.view(self.groups, -1, self.rank)
        return self.right, (left @ self.core).flatten(0, 1)

    def tensors(self) -> dict[str, Tensor]:
        return {"core": self.core, "left": self.left, "right": self.right}
