"""LoRA: a trained product of two thin matrices beside each frozen weight.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1; the rank-stabilised
scale is Kalajdzievski, arXiv 2312.03732.

    W' = W + s B A,    A [r, in],  B [out, r],  s = alpha / r   (rslora: alpha / sqrt(r))

B starts at zero, so the adapted model starts as the base model. A convolution's A has the convolution's kernel, stride
and padding and its B is 1x1; with groups every group has its own A and B. For an embedding (held as W = A B with
A [num_embeddings, r], B [embedding_dim, r] transposed) A is the one at zero, so that rows of tokens that never occur
stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS, fan_in, masters
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, nn.Embedding)
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of LoRA; r (in + out) parameters for each linear layer."""

    rank: int = option(16, help="r, the rank of the change of each weight")
    alpha: float | None = option(None, help="strength: the change is multiplied by alpha / rank; default: rank")
    dropout: float = option(0.0, help="probability of dropping an input of the trained branch while training")
    rslora: bool = option(False, help="divide alpha by sqrt(rank) instead of rank")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError("rank must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be in [0, 1)")

    @property
    def strength(self) -> float:
        """s in the module's equation."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """LoRA for the layers of one component."""
    return Method({name: LoRA(config, layer) for name, layer in layers.items()})


class LoRA(nn.Module, Adapter):
    """The two factors of one layer, ``down`` [groups r, ...] (A) and ``up`` [out, r] (B)."""

    def __init__(self, config: Config, layer: nn.Module) -> None:
        super().__init__()
        self.strength, self.dropout, self.rank = config.strength, config.dropout, config.rank
        place, weight = masters(layer), layer.weight
        assert isinstance(weight, Tensor)
        self.groups = int(getattr(layer, "groups", 1))
        self.embedding = isinstance(layer, nn.Embedding)
        if self.embedding:
            self.down = nn.Parameter(torch.zeros(weight.shape[0], config.rank, **place))
            self.up = nn.Parameter(torch.randn(weight.shape[1], config.rank, **place) / math.sqrt(config.rank))
            return
        # The uniform fan-in initialisation that torch gives the layers themselves.
        bound = 1 / math.sqrt(fan_in(layer))
        down = torch.empty(self.groups * config.rank, *weight.shape[1:], **place).uniform_(-bound, bound)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], config.rank, **place))

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``w + scale s B A``, group by group."""
        if self.embedding:
            change = self.down @ self.up.T
        else:
            down = self.down.reshape(self.groups, self.rank, -1)
            change = (self.up.view(self.groups, -1, self.rank) @ down).view(w.shape)
        return w + (scale * self.strength * change).to(w.dtype)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """``layer(x) + scale s B A x``; the product B A is never formed."""
        layer, y = beneath.layer, beneath(x)
        if self.embedding:
            # With the padding index a padding token's row of A gets no gradient, as in the layer itself.
            low = F.embedding(x, self.down, layer.padding_idx)
            return y + (scale * self.strength * F.linear(low, self.up)).to(y.dtype)
        x = F.dropout(x, self.dropout, self.training)
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(layer, nn.Linear):
            change = F.linear(F.linear(x, down), up)
        else:
            low = layer._conv_forward(x, down, None)
            convolve = _CONV[down.dim()]
            change = convolve(low, up.view(*up.shape, *[1] * (down.dim() - 2)), groups=self.groups)
        return torch.add(y, change, alpha=scale * self.strength)

    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}
