"""DiaBlo: training of the diagonal blocks of each weight.

Gurses et al., "DiaBlo: Diagonal Blocks Are Sufficient For Finetuning", arXiv 2506.03230.

    W' = W + blockdiag(T_1 .. T_N)^T,    T_n [in / N, out / N], zero at the start

Where N does not divide a linear layer's sizes, blocks are rounded up and the overhang is cut off. A convolution's
blocks lie along its channels, each with the whole kernel: the change is a convolution in N groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS, masters
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of DiaBlo; some in x out / N parameters for each linear layer."""

    blocks: int = option(
        64, least=1, greatest=65536, help="N; a convolution takes the largest number up to it that divides its channels"
    )
    dropout: float = option(
        0.0, least=0, below=1, help="probability of dropping an input of the trained branch while training"
    )


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """DiaBlo for the layers of one component."""
    return Method({name: Blocks(config, layer) for name, layer in layers.items()})


def linear_shape(blocks: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    """(N, p, q): number and size of the blocks, which cover every input and every output."""
    p, q = math.ceil(inputs / blocks), math.ceil(outputs / blocks)
    return max(math.ceil(inputs / p), math.ceil(outputs / q)), p, q


def conv_blocks(blocks: int, layer: Any) -> int:
    """N for a convolution: a multiple of its groups that divides both channel numbers."""
    common, groups = math.gcd(layer.in_channels, layer.out_channels), layer.groups
    fitting = (n for n in range(min(blocks, common), 0, -1) if common % n == 0 and n % groups == 0)
    return next(fitting, groups)


class Blocks(nn.Module, Adapter):
    """The trained blocks: [N, p, q] of a linear layer, [out, in / N, kernel ...] of a convolution."""

    def __init__(self, config: Config, layer: Any) -> None:
        super().__init__()
        self.dropout, self.linear = config.dropout, isinstance(layer, nn.Linear)
        if self.linear:
            shape: tuple[int, ...] = linear_shape(config.blocks, layer.in_features, layer.out_features)
        else:
            self.number = conv_blocks(config.blocks, layer)
            shape = (layer.out_channels, layer.in_channels // self.number, *layer.kernel_size)
        self.change = nn.Parameter(torch.zeros(shape, **masters(layer)))

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``w`` plus the blocks in their places."""
        return w + (scale * (self._linear_change(w) if self.linear else self._conv_change(w))).to(w.dtype)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """The layer's output plus one batched product of its blocks."""
        layer, y = beneath.layer, beneath(x)
        x = F.dropout(x, self.dropout, self.training).to(y.dtype)
        change = self.change.to(y.dtype)
        if self.linear:
            n, p, _ = change.shape
            parts = F.pad(x.reshape(-1, x.shape[-1]), (0, n * p - x.shape[-1])).view(-1, n, p).transpose(0, 1)
            low = torch.bmm(parts, change).transpose(0, 1).reshape(*x.shape[:-1], -1)[..., : y.shape[-1]]
            return torch.add(y, low, alpha=scale)
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = layer.padding if layer.padding_mode == "zeros" else 0
        low = _CONV[change.dim()](x, change, None, layer.stride, padding, layer.dilation, self.number)
        return torch.add(y, low, alpha=scale)

    def tensors(self) -> dict[str, Tensor]:
        return {"change": self.change}

    def _linear_change(self, w: Tensor) -> Tensor:
        n, p, q = self.change.shape
        dense = self.change.new_zeros(n, q, n, p)
        # [q, p, n] view of the diagonal blocks.
        dense.diagonal(dim1=0, dim2=2).copy_(self.change.permute(2, 1, 0))
        return dense.view(n * q, n * p)[: w.shape[0], : w.shape[1]]

    def _conv_change(self, w: Tensor) -> Tensor:
        """Every output channel's block at its place among the inputs of the output channel's own group."""
        within = w.shape[1] // self.change.shape[1]  # blocks in each group of the base
        rows = self.change.unflatten(0, (-1, within, w.shape[0] // self.number))
        dense = rows.new_zeros(*rows.shape[:3], within, *rows.shape[3:])
        dense.diagonal(dim1=1, dim2=3).copy_(rows.movedim(1, -1))
        return dense.reshape(w.shape)
