"""Changes of a weight that are a product of two thin factors, made anew from the parameters in each forward pass."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS
from visiontune.adapters.base import Adapter, Beneath

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Thin(nn.Module, Adapter):
    """``W' = W + s up down``; every group of a convolution has its own factors.

    Args:
        layer: a linear layer or a convolution. strength: s.
    """

    def __init__(self, layer: Any, strength: float) -> None:
        super().__init__()
        self.groups, self.strength = int(getattr(layer, "groups", 1)), strength

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """``down`` [groups r, in, kernel ...] and ``up`` [out, r], in the dtype of the parameters."""

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
        if isinstance(layer, nn.Linear):
            low = F.linear(F.linear(x, down), up)
        else:
            low = layer._conv_forward(x, down, None)
            low = _CONV[down.dim()](low, up.view(*up.shape, *[1] * (down.dim() - 2)), groups=self.groups)
        return torch.add(y, low.to(y.dtype), alpha=scale * self.strength)

    @torch.no_grad()
    def low_rank(self, scale: float) -> tuple[Tensor, Tensor] | None:
        """The factors, with the scale in ``up``; none for several groups, whose factors are others."""
        if self.groups > 1:
            return None
        down, up = self.factors()
        return down, scale * self.strength * up
