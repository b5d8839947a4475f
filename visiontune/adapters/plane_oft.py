"""Orthogonal finetuning in few planes: a rotation of all inputs of a weight whose generator has low rank.

    W' = W R^T (so W' x = W (R^T x)),   R = (I + Q)(I - Q)^-1,   Q = A B^T - B A^T,   A, B [d, r]

The rotation of OFT (Qiu et al., arXiv 2306.07280, equation 3) with another generator than its blocks: R turns a space
of at most 2 r dimensions and leaves everything at right angles to it alone, where a block of OFT turns what all inputs
have in its coordinates. The aim is that of reflections along few directions (Yuan et al., "Bridging The Gap between
Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation", arXiv 2405.17484); the parametrisation is
visiontune's. With U = [A, -B] and V = [B, A], Q = U V^T, and by the identity of Woodbury only 2 r x 2 r is inverted:

    R = I + T V^T,   T = 2 U (I - V^T U)^-1,   W' = W + (W V) T^T

so the change of a weight has rank 2 r, and is exported as a LoRA of that rank. B starts at zero and A with
random columns of about unit length. Row norms of W and all angles between rows stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS, compute_dtype, fan_in, masters, pointwise, run
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
# U V^T is the same for any; at the start it keeps A^T A below 1, so that the inverse needs no pivots and is exact.
_BALANCE = 4.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of OFT in few planes; 2 r d parameters for d inputs (of all groups of a convolution)."""

    rank: int = option(8, least=1, greatest=16384, help="r, pairs of directions; at most half of a layer's inputs")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """OFT in few planes for the layers of one component."""
    return Method({name: Planes(config.rank, layer) for name, layer in layers.items()})


class Planes(nn.Module, Adapter):
    """``first`` (A) and ``second`` (B) [groups, d, r] of one layer."""

    def __init__(self, rank: int, layer: Any) -> None:
        super().__init__()
        d, place = fan_in(layer), masters(layer)
        self.groups, self.rank = int(getattr(layer, "groups", 1)), max(1, min(rank, d // 2))
        self.first = nn.Parameter(torch.randn(self.groups, d, self.rank, **place) / math.sqrt(d))
        self.second = nn.Parameter(torch.zeros(self.groups, d, self.rank, **place))

    def factors(self, scale: float) -> tuple[Tensor, Tensor]:
        """T and V [groups, d, 2 r] of ``scale * Q``, in the dtype of the parameters."""
        with torch.autocast(self.first.device.type, enabled=False):
            a, b = self.first, scale * self.second
            u, v = torch.cat([a, -_BALANCE * b], 2), torch.cat([b, a / _BALANCE], 2)
            small = torch.eye(u.shape[2], device=u.device, dtype=u.dtype) - v.mT @ u
            # I - V^T U has the eigenvalues of I - Q that are not 1, so it is never singular.
            return 2 * u @ torch.linalg.inv_ex(small).inverse, v

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``W R^T``, group by group; a scale other than 1 multiplies Q, so R stays orthogonal."""
        down, up = self._product(w, scale)
        r = up.shape[1]
        return w + (up.reshape(self.groups, -1, r) @ down.reshape(self.groups, r, -1)).to(w.dtype).view(w.shape)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """``layer(x R)`` of a linear layer; of a convolution ``layer(x) + (W V) T^T x``. R is never formed."""
        layer, dtype = beneath.layer, compute_dtype(x)
        if isinstance(layer, nn.Linear):
            t, v = (factor[0].to(dtype) for factor in self.factors(scale))
            x = x.to(dtype)
            return beneath(x + (x @ t) @ v.mT)
        down, up = self._product(beneath.weight(), scale)
        return beneath(x) + pointwise(layer, run(layer, x.to(dtype), down.to(dtype), None), up.to(dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {"first": self.first, "second": self.second}

    def _product(self, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """T^T as kernels [groups 2 r, in / groups, kernel ...], and W V [out, 2 r]."""
        t, v = self.factors(scale)
        rows = w.reshape(self.groups, w.shape[0] // self.groups, -1).to(v.dtype)
        return t.mT.reshape(-1, *w.shape[1:]), (rows @ v).flatten(0, 1)
