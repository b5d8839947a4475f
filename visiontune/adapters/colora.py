"""CoLoRA: LoRA whose rank in each layer follows what the layer contributes to the task.

Park et al., "Contribution-based Low-Rank Adaptation with Pre-training Model for Real Image Restoration", ECCV 2024,
arXiv 2408.01099. No code was published: the formulae below are a reconstruction, unverified in detail.

    theta*  = theta after a short full fine-tuning of the adapted layers' weights (the proxy)
    F_l     = (1/|l|) sum_{w in l} | (theta*_w - theta_w) mean_u dL/dw(theta + u (theta* - theta)) |
    r_l     proportional to F_l ^ beta, between a floor and half the full rank, at a fixed total

The mean over u in (0, 1) makes these integrated gradients: without the absolute value they sum to L(theta*) - L(theta).
The strength of the change is the same in all layers, whatever their ranks, and the base is left bit for bit as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visiontune.adapters import _slots
from visiontune.adapters._budget import proportional
from visiontune.adapters._evidence import Evidence
from visiontune.adapters._layers import CONVOLUTIONS, masters
from visiontune.adapters._low_rank import full_rank
from visiontune.adapters._slots import Slots, rank_cost
from visiontune.adapters.base import Method
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class Config(_slots.Config):
    """Options of CoLoRA and of LoRA; at most LoRA's parameters at ``rank`` (or, on request, LoRA's sum of ranks)."""

    rank: int = option(
        16,
        least=1,
        greatest=16384,
        help="of a LoRA that costs as much; the rank of all layers until the task has been seen",
    )
    spread: float = option(
        1.0, least=0, greatest=1000, help="beta: 0 gives equal ranks, 1 ranks in proportion to the contributions"
    )
    min_rank: int = option(1, least=0, greatest=16384, help="of each layer; with 0 layers of no use stay as they are")
    total: Literal["parameters", "ranks"] = option(
        "parameters", help="what stays as in that LoRA: parameters (short by less than one rank) or the sum of ranks"
    )
    proxy_steps: int = option(
        64, least=1, greatest=1_000_000, help="steps of the full fine-tuning that tells what layers contribute"
    )
    proxy_lr: float = option(1e-5, above=0, greatest=100, help="its learning rate (Adam)")
    points: int = option(
        8, least=1, greatest=10_000, help="places between the base and the proxy at which gradients are taken"
    )


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """CoLoRA for the layers of one component: LoRA until it is prepared."""
    return CoLoRA(config, layers)


class CoLoRA(Slots):
    """LoRAs of ranks by contribution."""

    config: Config

    def prepare(self, evidence: Evidence) -> None:
        """Choose the ranks.

        Raises:
            UserError: the floor alone costs more than the budget.
        """
        config, parts = self.config, attributions(evidence, self.config)
        # The power of a share, lest tiny contributions vanish in it.
        mean = {name: float(part.abs().mean(dtype=torch.float64)) for name, part in parts.items()}
        top = max(mean.values()) or 1.0
        scores = {name: (value / top) ** config.spread for name, value in mean.items()}
        costs = {name: rank_cost(layer) if config.total == "parameters" else 1 for name, layer in self.layers.items()}
        caps = {name: half_rank(layer) for name, layer in self.layers.items()}
        budget = config.rank * sum(costs.values())
        self.put_ranks(proportional(scores, budget, costs=costs, floor=config.min_rank, caps=caps))


def attributions(evidence: Evidence, config: Config) -> dict[str, Tensor]:
    """Signed, of each entry of each weight, to the change of the losses by the proxy fine-tuning; as the weights."""
    with along(evidence.layers) as (path, go):
        fine_tune(evidence, config, path, go)
        sums = {name: torch.zeros_like(delta) for name, delta in path.items()}
        for point in range(config.points):
            go((point + 0.5) / config.points)
            for name, gradient in evidence.gradients().items():
                sums[name] += gradient
        return {name: total.mul_(path[name]).div_(config.points) for name, total in sums.items()}


def fine_tune(evidence: Evidence, config: Config, path: Mapping[str, Tensor], go: Callable[[float], None]) -> None:
    """Adam on the weights; ``path`` collects the changes in full precision, however coarse the weights are."""
    optimizer = torch.optim.Adam(list(path.values()), config.proxy_lr)
    for step in range(config.proxy_steps):
        gradients = evidence.over([evidence.losses[step % len(evidence.losses)]]).gradients()
        for name, delta in path.items():
            delta.grad = gradients[name]
        optimizer.step()
        go(1.0)
    optimizer.zero_grad()


@contextmanager
def along(layers: Mapping[str, Any]) -> Iterator[tuple[dict[str, Tensor], Callable[[float], None]]]:
    """A path of the weights: what lies at its end, zero at first, and how to go to the share u of it.

    Afterwards the weights are as before, bit for bit.
    """
    start = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    path = {name: torch.zeros(layer.weight.shape, **masters(layer)) for name, layer in layers.items()}

    @torch.no_grad()
    def go(u: float) -> None:
        for name, layer in layers.items():
            layer.weight.copy_(start[name] + u * path[name])

    try:
        yield path, go
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(start[name])


def half_rank(layer: Any) -> int:
    """Half the full rank of a layer's weight, or of one group's."""
    return max(1, full_rank(layer) // 2)
