"""Changes of a weight that are a product of two thin factors, made anew from the parameters in each forward pass."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS, fan_in, masters, pointwise, run
from visiontune.adapters.base import Adapter, Beneath

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)


def full_rank(layer: Any) -> int:
    """The greatest rank that a change of the layer's weight (of one group) can have."""
    return min(layer.weight.shape[0] // int(getattr(layer, "groups", 1)), fan_in(layer))


def matrices(layer: Any, values: Tensor) -> Tensor:
    """``values`` of the weight's shape as [groups, out / groups, in / groups x kernel], in float64 on the CPU.

    Decompositions of large matrices are more exact there, and the same everywhere.
    """
    groups = int(getattr(layer, "groups", 1))
    return values.detach().reshape(groups, values.shape[0] // groups, -1).cpu().double()


class LowRank(nn.Module, Adapter):
    """``W' = W + s up down``; every group of a convolution has its own factors.

    Args:
        layer: a linear layer or a convolution. strength: s.
    """

    def __init__(self, layer: Any, strength: float = 1.0) -> None:
        super().__init__()
        self.groups, self.strength = int(getattr(layer, "groups", 1)), strength

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """``down`` [groups r, in / groups, kernel ...] and ``up`` [out, r], in the dtype of the parameters."""

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``w + scale s up down``, group by group."""
        down, up = self.factors()
        r = up.shape[1]
        change = up.reshape(self.groups, -1, r) @ down.reshape(self.groups, r, -1)
        return w + (scale * self.strength * change.view(w.shape)).to(w.dtype)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """``layer(x) + scale s up down x``; the product of the factors is never formed."""
        layer, y = beneath.layer, beneath(x)
        with torch.autocast(x.device.type, enabled=False):
            down, up = (factor.to(x.dtype) for factor in self.factors())
        low = pointwise(layer, run(layer, x, down, None), up)
        return torch.add(y, low.to(y.dtype), alpha=scale * self.strength)

    @torch.no_grad()
    def low_rank(self, scale: float) -> tuple[Tensor, Tensor] | None:
        """The factors, with the scale in ``up``; none for several groups, whose factors are others."""
        if self.groups > 1:
            return None
        down, up = self.factors()
        return down, scale * self.strength * up


class Difference(LowRank):
    """``W' = W + s (B A - B0 A0)`` with ``A = A0 + dA``, ``B = B0 + dB``: the start is the base bit for bit.

    ``down`` (dA) [groups r, in / groups, kernel ...] and ``up`` (dB) [out, r] are trained, from zero, beside the frozen
    ``down0`` and ``up0`` of the same shapes, zero until they are filled.
    """

    down0: Tensor
    up0: Tensor

    def __init__(self, layer: Any, rank: int, strength: float = 1.0) -> None:
        super().__init__(layer, strength)
        weight, place = layer.weight, masters(layer)
        self.down = nn.Parameter(torch.zeros(self.groups * rank, *weight.shape[1:], **place))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, **place))
        self.register_buffer("down0", torch.zeros_like(self.down, requires_grad=False))
        self.register_buffer("up0", torch.zeros_like(self.up, requires_grad=False))

    def factors(self) -> tuple[Tensor, Tensor]:
        """[A; dA] and [dB, B0]: their product is B A - B0 A0."""
        parts = [v.unflatten(0, (self.groups, -1)) for v in (self.down0 + self.down, self.down)]
        return torch.cat(parts, 1).flatten(0, 1), torch.cat([self.up, self.up0], 1)

    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up, "down0": self.down0, "up0": self.up0}
