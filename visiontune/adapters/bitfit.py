"""BitFit: training of the biases alone.

Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
ACL 2022, arXiv 2106.10199.

    b' = b + delta

For diffusion models and vision towers the biases of convolutions and norms count as well. Layers without a bias can get
one, starting at zero. Weight decay pulls ``delta``, that is the model towards its base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS, NORMS, masters
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.errors import UserError
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *NORMS)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of BitFit; one parameter for each output channel of a layer with a bias."""

    create: bool = option(False, help="give layers without a bias one, such as attention projections")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """BitFit for the layers of one component.

    Raises:
        UserError: none of the layers has a bias.
    """
    adapters = {name: Bias(config, layer) for name, layer in layers.items()}
    if all(adapter.change is None for adapter in adapters.values()):
        raise UserError("none of the targeted layers has a bias: set adapter.create=true, or widen adapter.targets")
    return Method(adapters)


class Bias(nn.Module, Adapter):
    """The change of one layer's bias, [out]; ``None`` where the layer keeps having none."""

    def __init__(self, config: Config, layer: Any) -> None:
        super().__init__()
        wanted = config.create or getattr(layer, "bias", None) is not None
        zeros = torch.zeros(layer.weight.shape[0], **masters(layer))
        self.change = nn.Parameter(zeros) if wanted else None
        self.channels = -1
        if isinstance(layer, nn.GroupNorm):
            self.channels = 1
        elif isinstance(layer, CONVOLUTIONS):
            self.channels = 1 - layer.weight.dim()  # counted from the end, since a batch dimension may be missing

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``w`` itself."""
        return w

    def bias(self, b: Tensor | None, scale: float) -> Tensor | None:
        """``b + scale change``."""
        if self.change is None:
            return b
        return scale * self.change if b is None else (b + scale * self.change).to(b.dtype)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """The layer's output plus the change."""
        y = beneath(x)
        if self.change is None:
            return y
        shape = [1] * y.dim()
        shape[self.channels] = -1
        return y + (scale * self.change).to(y.dtype).view(shape)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.change is None else {"change": self.change}
