"""EVA: a LoRA that starts at the directions in which its layers' inputs vary on the task.

Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170.

    C = (1/n) sum_x (x - m)(x - m)^T = V diag(lambda) V^T,    A = V_r^T,  B = 0,    lambda falling

The mean m is taken as 0 with ``center=false``; with ``whiten`` row i of A is divided by sqrt(lambda_i). The ranks of a
component's layers add up to ``rank`` times their number and go to the directions of the greatest shares of their
layer's variance, lambda_i / trace(C). The sums over x are exact, whatever the batches; the paper's incremental
decomposition is not needed. Groups of a convolution have their own directions and one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visiontune.adapters import lora
from visiontune.adapters._evidence import Evidence, Moments
from visiontune.adapters._low_rank import LAYERS, full_rank
from visiontune.adapters.base import Beneath, Method
from visiontune.schema import option

__all__ = ["LAYERS", "Config", "build"]


@dataclass(frozen=True, kw_only=True)
class Config(lora.Config):
    """Options of LoRA and of its start; ``rank`` is the mean over a component's layers."""

    rho: float = option(
        2.0, least=1, greatest=1000, help="no layer gets more than rho times rank; 1 gives every layer the same"
    )
    center: bool = option(True, help="directions around the mean input; otherwise around zero")
    whiten: bool = option(False, help="divide each direction by the standard deviation of the inputs along it")
    batches: int = option(16, least=1, greatest=1_000_000, help="how many batches of the task are looked at")

    def __post_init__(self) -> None:
        if self.dora:
            raise ValueError("dora does not go with layers that may get no rank")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """A plain LoRA for the layers of one component, until it is prepared."""
    return EVA(config, layers)


class EVA(Method):
    """The factors of one component's layers."""

    plans = True

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        super().__init__({name: Directions(config, layer) for name, layer in layers.items()})
        self.config = config

    def prepare(self, evidence: Evidence) -> None:
        """Give every layer its rank and its directions."""
        most = round(self.config.rho * self.config.rank)
        found, shares = {}, {}
        for portion in evidence.portions():
            for name, moments in portion.items():
                layer = evidence.layers[name]
                found[name], shares[name] = directions(moments, min(most, full_rank(layer)), self.config)
        for name, rank in allocate(shares, self.config.rank * len(shares)).items():
            adapter = self.adapters[name]
            assert isinstance(adapter, Directions)
            adapter.start(found[name][:, :rank])

    def fit(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take on the saved ranks."""
        for name, tensors in saved.items():
            adapter = self.adapters[name]
            if isinstance(adapter, Directions) and "up" in tensors:
                adapter.resize(tensors["up"].shape[1])


def directions(moments: Moments, count: int, config: Config) -> tuple[Tensor, Tensor]:
    """A of the ``count`` leading directions, [groups, count, d], and their shares of the variance, [count], falling."""
    second = moments.covariance() if config.center else moments.second.cpu().double() / moments.count
    values, vectors = torch.linalg.eigh(second)
    values, rows = values.flip(1).clamp_min(0), vectors.mT.flip(1)[:, :count]
    total, leading = values.sum(), values[:, :count]
    shares = leading.sum(0) / total if total else leading.sum(0)
    if config.whiten:
        # A direction without any variance may have to make up a rank: it stays at a finite length.
        deviation = leading.clamp_min(1e-12 * float(values.max())).sqrt()
        rows = rows / torch.where(deviation > 0, deviation, 1.0)[:, :, None]
    return rows, shares


def allocate(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of the ``budget`` greatest shares belong to each layer; the shares of a layer are falling."""
    owners = torch.cat([torch.full((len(s),), i) for i, s in enumerate(shares.values())])
    order = torch.cat(list(shares.values())).sort(descending=True, stable=True).indices[:budget]
    return dict(zip(shares, owners[order].bincount(minlength=len(shares)).tolist(), strict=True))


class Directions(lora.LoRA):
    """A LoRA of any rank; with rank 0 nothing is trained and nothing computed."""

    def start(self, rows: Tensor) -> None:
        """Begin at A [groups, r, d] and B = 0."""
        self.resize(rows.shape[1])
        with torch.no_grad():
            self.down.copy_(rows.reshape(self.down.shape))

    def resize(self, rank: int) -> None:
        """Factors of another rank, both zero."""
        self.rank = rank
        down = self.down.new_zeros(self.groups * rank, *self.down.shape[1:])
        for name, value in (("down", down), ("up", self.up.new_zeros(self.up.shape[0], rank))):
            delattr(self, name)
            if rank:
                self.register_parameter(name, nn.Parameter(value))
            else:
                # No parameter: distributed training waits for the gradients of all there are.
                self.register_buffer(name, value)

    def weight(self, w: Tensor, scale: float) -> Tensor:
        return super().weight(w, scale) if self.rank else w

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        return super().forward(x, beneath, scale) if self.rank else beneath(x)
