"""Changes of a weight that are the product of two thin matrices."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS, fan_in
from visiontune.adapters.base import Adapter, Beneath

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


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
    """The change B A of one layer; every group of a convolution has its own factors.

    Args:
        layer: a linear layer or a convolution.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.groups = int(getattr(layer, "groups", 1))

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """A [groups r, in / groups, kernel ...] and B [out, r] as the parameters are now."""

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``w + scale B A``, group by group."""
        down, up = self.factors()
        r = up.shape[1]
        change = up.view(self.groups, -1, r) @ down.reshape(self.groups, r, -1)
        return w + (scale * change.reshape(w.shape)).to(w.dtype)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """``layer(x) + scale B A x``; the product B A is never formed."""
        layer, y = beneath.layer, beneath(x)
        x, down, up = (v.to(y.dtype) for v in (x, *self.factors()))
        if isinstance(layer, nn.Linear):
            return torch.add(y, F.linear(F.linear(x, down), up), alpha=scale)
        low, up = layer._conv_forward(x, down, None), up.view(*up.shape, *[1] * (down.dim() - 2))
        return torch.add(y, _CONV[down.dim()](low, up, groups=self.groups), alpha=scale)

    def low_rank(self, scale: float) -> tuple[Tensor, Tensor] | None:
        """A and ``scale B``; none for several groups, whose factors are others."""
        down, up = self.factors()
        return (down.detach(), scale * up.detach()) if self.groups == 1 else None
