"""SSF: a trained scale and shift of every feature.

Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", NeurIPS 2022,
arXiv 2210.08823, equations 3 and 4.

    y' = (1 + g) * y + h      for each output channel of a linear layer, a convolution or a norm

``g`` and ``h`` start at zero (the paper starts near it, see ``noise``), and weight decay pulls them there. Both fold
into the layer: W' = diag(1 + g) W, b' = (1 + g) b + h.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS, NORMS, masters
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *NORMS)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of SSF; two parameters for each output channel."""

    noise: float = option(
        0.0, least=0, greatest=100, help="standard deviation of the start; the paper's 0.02 changes the model at once"
    )


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """SSF for the layers of one component."""
    return Method({name: ScaleShift(config, layer) for name, layer in layers.items()})


class ScaleShift(nn.Module, Adapter):
    """One layer's ``gain`` and ``shift``, [out] each."""

    def __init__(self, config: Config, layer: Any) -> None:
        super().__init__()
        out = layer.weight.shape[0]
        self.gain = nn.Parameter(config.noise * torch.randn(out, **masters(layer)))
        self.shift = nn.Parameter(config.noise * torch.randn(out, **masters(layer)))

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``diag(1 + scale g) W``."""
        return (w + (scale * self.gain).view(-1, *[1] * (w.dim() - 1)) * w).to(w.dtype)

    def bias(self, b: Tensor | None, scale: float) -> Tensor | None:
        """``(1 + scale g) b + scale h``; a layer without a bias gets one."""
        if b is None:
            return scale * self.shift
        return (b + scale * (self.gain * b + self.shift)).to(b.dtype)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """Folded into the weight where that is smaller than the output, which the gradient would need."""
        layer = beneath.layer
        if isinstance(layer, nn.Linear) and x.numel() // x.shape[-1] <= layer.in_features:
            y = beneath(x)
            return y + (scale * self.gain).to(y.dtype) * y + (scale * self.shift).to(y.dtype)
        bias = self.bias(beneath.bias(), scale)
        assert bias is not None
        weight = self.weight(beneath.weight(), scale)
        return beneath.using(x, weight, bias.to(weight.dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {"gain": self.gain, "shift": self.shift}
