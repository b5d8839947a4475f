"""ALLoRA: a LoRA whose outputs' rows of B move the faster, the nearer to zero they are.

Huang and Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", arXiv 2410.09692; the exact form
of the factor is unverified.

    W' = W + B A;    each step:  B_i <- B_i + (step of the optimiser)_i / sqrt(|B_i| + 1 / eta^2)

The paper speaks of the gradient of row i. Optimisers such as Adam divide by the gradient's size, so a factor of the
gradient would vanish; here it multiplies what the optimiser did to the row (decoupled weight decay included). With
plain SGD both are the same. The factor is eta at B = 0 and 1 / sqrt(|B_i|) far from it. There is no dropout or alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from visiontune.adapters import lora
from visiontune.adapters._layers import CONVOLUTIONS
from visiontune.adapters.base import Method
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class Config(lora.Config):
    """LoRA's rank and the greatest factor; LoRA's other options are none of this method's."""

    eta: float = option(
        10.0, above=0, greatest=1e6, help="how many times faster than the optimiser's step a row at zero moves"
    )

    def __post_init__(self) -> None:
        if self.dropout or self.alpha is not None or self.rslora or self.dora:
            raise ValueError("dropout, alpha, rslora and dora do not go with rows that set their own rate")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """ALLoRA for the layers of one component."""
    return ALLoRA(config, layers)


def rates(up: Tensor, eta: float) -> Tensor:
    """The factor of each row of B, [out, 1]."""
    return (up.norm(dim=1, keepdim=True) + eta**-2).rsqrt()


class ALLoRA(Method):
    """The factors of one component, and between the two calls of a step what B was before it."""

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        factors = {name: lora.LoRA(config, layer) for name, layer in layers.items()}
        super().__init__(factors)
        self.factors, self.eta, self._before = factors, config.eta, dict[str, Tensor]()

    def before_step(self, step: int = 0, loss_scale: float = 1.0) -> None:
        """Remember every B."""
        self._before = {name: factors.up.detach().clone() for name, factors in self.factors.items()}

    @torch.no_grad()
    def after_step(self, done: float = 0.0, optimizer: Optimizer | None = None) -> None:
        """Stretch the step of each row by the factor that belongs to where it started."""
        for name, before in self._before.items():
            up = self.factors[name].up
            up.copy_(before + rates(before, self.eta) * (up - before))
        self._before = {}
