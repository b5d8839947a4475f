"""S2FT: training of a few whole channels of each weight.

Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", NeurIPS 2024,
arXiv 2412.06289.

    W' = W + scatter(S),    S holds whole columns (inputs) or whole rows (outputs) of W, zero at the start

The channels are gathered where they lie instead of being permuted to the front, so the base keeps its order. Of the
layer's input only the chosen channels are kept for the gradient when columns are trained.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS, masters
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of S2FT; share x in x out parameters for each linear layer."""

    share: float = option(0.03, above=0, greatest=1, help="share of the channels of each layer, rounded up; in (0, 1]")
    side: Literal["inputs", "outputs"] = option("inputs", help="train columns (input channels) or rows (outputs)")
    choice: Literal["random", "largest", "smallest"] = option("random", help="which channels: by chance or by norm")
    seed: int = option(
        0, least=0, greatest=2**63 - 1, help="of the random choice, which also depends on the layer's name"
    )


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """S2FT for the layers of one component."""
    return Method({name: Channels(config, name, layer) for name, layer in layers.items()})


def choose(config: Config, name: str, w: Tensor, dim: int) -> Tensor:
    """Ascending numbers of the trained channels along ``dim`` of ``w``."""
    count = math.ceil(config.share * w.shape[dim] - 1e-9)
    if config.choice == "random":
        rng = torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {name}".encode()))
        return torch.randperm(w.shape[dim], generator=rng)[:count].sort().values.to(w.device)
    norms = w.detach().float().transpose(0, dim).flatten(1).norm(dim=1)
    return norms.topk(count, largest=config.choice == "largest").indices.sort().values


class Channels(nn.Module, Adapter):
    """``change``, the chosen columns [out, n, kernel ...] or rows [n, in, kernel ...], and their ``index`` [n]."""

    index: Tensor

    def __init__(self, config: Config, name: str, layer: Any) -> None:
        super().__init__()
        self.dim = 1 if config.side == "inputs" else 0
        self.register_buffer("index", choose(config, name, layer.weight, self.dim))
        shape = list(layer.weight.shape)
        shape[self.dim] = len(self.index)
        self.change = nn.Parameter(torch.zeros(shape, **masters(layer)))

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``w`` with the change added to its channels."""
        return w.index_add(self.dim, self.index, (scale * self.change).to(w.dtype))

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """The layer's output plus a thin product of the chosen channels."""
        layer = beneath.layer
        if getattr(layer, "groups", 1) > 1:
            return beneath.using(x, self.weight(beneath.weight(), scale))
        y = beneath(x)
        change, x = self.change.to(y.dtype), x.to(y.dtype)
        channels = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()
        if self.dim == 1:
            x = x.index_select(channels, self.index)
        low = F.linear(x, change) if isinstance(layer, nn.Linear) else layer._conv_forward(x, change, None)
        if self.dim == 1:
            return torch.add(y, low, alpha=scale)
        return y.index_add(y.dim() + channels, self.index, low, alpha=scale)

    def tensors(self) -> dict[str, Tensor]:
        return {"change": self.change, "index": self.index}
