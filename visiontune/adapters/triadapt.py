"""TriAdaptLoRA: triangular LoRA factors whose rank grows during the run where the weights change most.

Liang et al., "TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient
Fine-Tuning", arXiv 2501.08008; the exact shapes and schedule of the paper are unverified.

    W' = W + s B A,    A [r, in] with A_ij = 0 for j < i,    B [out, r] with B_ij = 0 for i < j

Every layer starts with ``start_rank``. At set points of the run those layers gain rank whose importance

    |s B A|_F / sqrt(number of entries of W)

is not below the mean over the layers that can still grow, until the ranks together reach ``budget``. A new column of B
starts at zero and s stays what it is, so growth changes no output. The greatest rank is allocated from the start, which
keeps shapes static; what is not yet active is masked, gets a gradient of zero, and is not saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from visiontune.adapters._layers import fan_in, masters
from visiontune.adapters._low_rank import LAYERS, LowRank, full_rank
from visiontune.adapters.base import Method
from visiontune.schema import option

__all__ = ["LAYERS", "Config", "build"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of TriAdaptLoRA; as many parameters as LoRA of ``max_rank``, of which ``budget`` come to be used."""

    start_rank: int = option(4, least=1, greatest=16384, help="rank of every layer at first")
    max_rank: int = option(
        32, least=1, greatest=16384, help="the greatest rank of a layer, at most the smaller side of its weight"
    )
    budget: float = option(
        8.0, least=1, greatest=16384, help="mean rank of the layers at the end; from start_rank to max_rank"
    )
    growths: int = option(
        6,
        least=1,
        greatest=10_000,
        help="at how many points of the run ranks grow, by equal parts of what is left to gain",
    )
    grow_from: float = option(
        0.1, least=0, greatest=1, help="share of the run that is done at the first of these points"
    )
    grow_until: float = option(0.6, least=0, greatest=1, help="share of the run that is done at the last")
    alpha: float | None = option(
        None, above=0, greatest=1e6, help="strength: the change is multiplied by alpha / max_rank; default: max_rank"
    )

    def __post_init__(self) -> None:
        if not self.start_rank <= self.budget <= self.max_rank:
            raise ValueError("budget must be at least start_rank, and max_rank at least budget")
        if self.grow_from > self.grow_until:
            raise ValueError("grow_from must be at most grow_until")

    @property
    def strength(self) -> float:
        """s in the module's equation."""
        return 1.0 if self.alpha is None else self.alpha / self.max_rank

    def due(self, done: float) -> int:
        """How many growths belong to the share ``done`` of the run."""
        pause = (self.grow_until - self.grow_from) / max(self.growths - 1, 1)
        return sum(done >= self.grow_from + i * pause - 1e-9 for i in range(self.growths))


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """TriAdaptLoRA for the layers of one component."""
    return TriAdapt(config, layers)


class TriAdapt(Method):
    """The factors of one component, and how often they have grown."""

    grown: Tensor

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        triangles = {name: Triangles(config, layer) for name, layer in layers.items()}
        super().__init__(triangles)
        self.config, self.triangles = config, triangles
        self.first = sum(int(t.rank) for t in triangles.values())
        self.budget = min(int(config.budget * len(layers)), sum(t.limit for t in triangles.values()))
        self.register_buffer("grown", torch.tensor(0))

    @torch.no_grad()
    def after_step(self, done: float = 0.0, optimizer: Optimizer | None = None) -> None:
        """Spend the part of the budget that is due."""
        due = self.config.due(done)
        if due <= int(self.grown):
            return
        self.grown.fill_(due)
        ranks = {name: int(t.rank) for name, t in self.triangles.items()}
        total = self.first + (self.budget - self.first) * due // self.config.growths
        for name, more in self._gains(ranks, total - sum(ranks.values())).items():
            self.triangles[name].grow(ranks[name] + more, optimizer)

    def _gains(self, ranks: Mapping[str, int], count: int) -> dict[str, int]:
        """How much rank each layer gains of ``count``: one at a time, those above the threshold by turns."""
        importance = {name: t.importance() for name, t in self.triangles.items()}
        gains = dict.fromkeys(ranks, 0)
        while count > 0:
            able = [name for name in ranks if ranks[name] + gains[name] < self.triangles[name].limit]
            values = [importance[name] for name in able]
            # Rounding can lift the mean of equal values above them all.
            threshold = min(sum(values) / len(values), max(values)) if values else 0.0
            chosen = sorted((n for n in able if importance[n] >= threshold), key=lambda n: -importance[n])[:count]
            if not chosen:
                break
            for name in chosen:
                gains[name] += 1
            count -= len(chosen)
        return gains

    def fit(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take on the saved ranks."""
        for name, tensors in saved.items():
            if "rank" in tensors:
                self.triangles[name].rank.copy_(tensors["rank"])


class Triangles(LowRank):
    """``down`` (A) [groups limit, in, kernel ...] and ``up`` (B) [out, limit]; the first ``rank`` of the limit act."""

    rank: Tensor

    def __init__(self, config: Config, layer: Any) -> None:
        super().__init__(layer, config.strength)
        weight, place, inputs = layer.weight, masters(layer), fan_in(layer)
        self.limit, self.size = min(config.max_rank, full_rank(layer)), weight.numel()
        bound = 1 / math.sqrt(inputs)
        down = torch.empty(self.groups, self.limit, inputs, **place).uniform_(-bound, bound).triu()
        self.down = nn.Parameter(down.view(-1, *weight.shape[1:]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], self.limit, **place))
        self.register_buffer("rank", torch.tensor(min(config.start_rank, self.limit), device=place["device"]))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, zero outside of their triangles and, in A, beyond the rank: that stops both gradients there."""
        active = (torch.arange(self.limit, device=self.rank.device) < self.rank).to(self.down.dtype)
        down = self.down.view(self.groups, self.limit, -1).triu() * active[:, None]
        up = self.up.view(self.groups, -1, self.limit).tril()
        return down.view_as(self.down), up.flatten(0, 1)

    def low_rank(self, scale: float) -> tuple[Tensor, Tensor] | None:
        """Likewise, without what is beyond the rank."""
        whole, rank = super().low_rank(scale), int(self.rank)
        return None if whole is None else (whole[0][:rank], whole[1][:, :rank])

    @torch.no_grad()
    def importance(self) -> float:
        """Frobenius norm of the change over the root of its size."""
        down, up = self.factors()
        down, up = down.reshape(self.groups, self.limit, -1), up.view(self.groups, -1, self.limit)
        square = ((down @ down.mT) * (up.mT @ up)).sum().clamp_min(0)
        return self.strength * float((square / self.size).sqrt())

    def grow(self, rank: int, optimizer: Optimizer | None) -> None:
        """Let ``rank`` rows and columns act; the new ones from zero in B and without a past in the optimiser."""
        new = torch.arange(int(self.rank), rank, device=self.rank.device)
        rows = (torch.arange(self.groups, device=new.device)[:, None] * self.limit + new).flatten()
        self.up[:, new] = 0
        for parameter, dim, index in ((self.down, 0, rows), (self.up, 1, new)):
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.index_fill_(dim, index, 0)
        self.rank.fill_(rank)

    def tensors(self) -> dict[str, Tensor]:
        rank, down = int(self.rank), self.down.view(self.groups, self.limit, *self.down.shape[1:])
        return {"down": down[:, :rank], "up": self.up[:, :rank], "rank": self.rank}
