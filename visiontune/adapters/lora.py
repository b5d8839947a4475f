"""LoRA: a trained product of two thin matrices beside each frozen weight.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1; the rank-stabilised
scale is Kalajdzievski, arXiv 2312.03732.

    W' = W + s B A,    A [r, in],  B [out, r],  s = alpha / r   (rslora: alpha / sqrt(r))

B starts at zero, so the adapted model starts as the base model. A convolution's A has the convolution's kernel, stride
and padding and its B is 1x1; with groups every group has its own A and B. For an embedding (held as W = A B with
A [num_embeddings, r], B [embedding_dim, r] transposed) A is the one at zero, so that rows of tokens that never occur
stay as they are.

With ``dora`` (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equations 5 and 11) the
length of each output's row is trained apart from its direction, and the length of V counts as constant in gradients:

    W' = (|W| + g) V / |V|,    V = W + s B A,    g [out], zero at the start
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS, fan_in, masters, pointwise, run
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.errors import UserError
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, nn.Embedding)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of LoRA; r (in + out) parameters for each linear layer."""

    rank: int = option(16, least=1, greatest=16384, help="r, the rank of the change of each weight")
    alpha: float | None = option(
        None, above=0, greatest=1e6, help="strength: the change is multiplied by alpha / rank; default: rank"
    )
    dropout: float = option(
        0.0, least=0, below=1, help="probability of dropping an input of the trained branch while training"
    )
    rslora: bool = option(False, help="divide alpha by sqrt(rank) instead of rank")
    dora: bool = option(False, help="train the length of each output's row apart from its direction (no embeddings)")

    @property
    def strength(self) -> float:
        """s in the module's equation."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """LoRA for the layers of one component.

    Raises:
        UserError: an embedding with ``dora``.
    """
    lookups = [name for name, layer in layers.items() if isinstance(layer, nn.Embedding)]
    if config.dora and lookups:
        raise UserError(f"DoRA does not adapt the embedding '{lookups[0]}': narrow adapter.targets, or dora=false")
    kind = DoRA if config.dora else LoRA
    return Method({name: kind(config, layer) for name, layer in layers.items()})


def row_lengths(w: Tensor) -> Tensor:
    """Euclidean length of each output's row of a weight, [out], in float64 on the CPU."""
    return w.detach().cpu().double().flatten(1).norm(dim=1)


def refit(adapter: LoRA, tensors: Mapping[str, Tensor], was: Config) -> dict[str, Tensor]:
    """The factors of a file with options ``was`` in the rank and strength of ``adapter``, as the start of a training.

    A greater rank gets the adapter's own fresh rows of A and zeros beside B, which change nothing; a smaller one the
    best approximation by singular values.

    Raises:
        UserError: one of the two is DoRA.
    """
    if was.dora != isinstance(adapter, DoRA):
        raise UserError(f"start: the file has dora={str(was.dora).lower()}: set dora to it")
    groups, rank = adapter.groups, was.rank
    lookup = adapter.embedding
    # An embedding's factors stand the other way round: its A is the one that starts at zero.
    zero, fresh = (tensors["down"], tensors["up"].T) if lookup else (tensors["up"], tensors["down"])
    left = zero.to(adapter.down).reshape(groups, -1, rank) * (was.strength / adapter.strength)
    right = fresh.to(adapter.down).reshape(groups, rank, -1)
    own = (adapter.up.T if lookup else adapter.down).detach().reshape(groups, adapter.rank, -1)
    if adapter.rank > rank:
        left = F.pad(left, (0, adapter.rank - rank))
        right = torch.cat([right, own[:, rank:]], 1)
    elif adapter.rank < rank:
        left, right = _shrunk(left, right, adapter.rank)
    left = left.flatten(0, 1)
    shapes = {"down": left, "up": right[0].T} if lookup else {"down": right.reshape(adapter.down.shape), "up": left}
    return {**tensors, **shapes}


def _shrunk(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of a smaller rank for ``left @ right``, whose product is never formed."""
    (q_left, small_left), (q_right, small_right) = (torch.linalg.qr(t.double().cpu()) for t in (left, right.mT))
    u, s, v = torch.linalg.svd(small_left @ small_right.mT, full_matrices=False)
    root = s[:, :rank].sqrt()
    pair = q_left @ (u[..., :rank] * root[:, None]), (root[..., None] * v[:, :rank]) @ q_right.mT
    # A layer of few inputs or outputs has fewer singular values than ``rank``.
    short = rank - root.shape[1]
    return F.pad(pair[0], (0, short)).to(left), F.pad(pair[1], (0, 0, 0, short)).to(right)


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
        return w + (scale * self._change(w)).to(w.dtype)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """``layer(x) + scale s B A x``; the product B A is never formed."""
        y = beneath(x)
        return torch.add(y, self._low(x, beneath.layer).to(y.dtype), alpha=scale * self.strength)

    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}

    def low_rank(self, scale: float) -> tuple[Tensor, Tensor] | None:
        """A and ``scale s B``; none for an embedding and for several groups, whose factors are others."""
        whole = not self.embedding and self.groups == 1
        return (self.down.detach(), scale * self.strength * self.final_up().detach()) if whole else None

    def final_up(self) -> Tensor:
        """B as it is merged."""
        return self.up

    def active_up(self) -> Tensor:
        """B as this forward pass uses it."""
        return self.up

    def _change(self, w: Tensor) -> Tensor:
        """``s B A`` in the shape of ``w``."""
        if self.embedding:
            return self.strength * (self.down @ self.up.T)
        down = self.down.reshape(self.groups, self.rank, -1)
        return self.strength * (self.final_up().view(self.groups, -1, self.rank) @ down).view(w.shape)

    def _low(self, x: Tensor, layer: Any) -> Tensor:
        """``B A x``."""
        if self.embedding:
            # With the padding index a padding token's row of A gets no gradient, as in the layer itself.
            return F.linear(F.embedding(x, self.down, layer.padding_idx), self.up)
        x = F.dropout(x, self.dropout, self.training)
        down, up = self.down.to(x.dtype), self.active_up().to(x.dtype)
        return pointwise(layer, run(layer, x, down, None), up)


class DoRA(LoRA):
    """LoRA with ``gain`` [out], the change of the rows' lengths."""

    def __init__(self, config: Config, layer: Any) -> None:
        super().__init__(config, layer)
        self.gain = nn.Parameter(torch.zeros(layer.weight.shape[0], **masters(layer)))

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``(|w| + scale g) v / |v|`` with ``v = w + scale s B A``."""
        v = w + (scale * self._change(w)).to(w.dtype)
        return v + (self._stretch(w, v, scale) * v).to(w.dtype)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """The weight is formed for the lengths of its rows only, and not kept."""
        y, w, bias = beneath(x), beneath.weight(), beneath.bias()
        with torch.no_grad():
            v = w + (scale * self._change(w)).to(w.dtype)
        channels = [-1] if isinstance(beneath.layer, nn.Linear) else [-1, *[1] * (w.dim() - 2)]
        stretch = self._stretch(w, v, scale).view(channels).to(y.dtype)
        change = scale * self.strength * self._low(x, beneath.layer).to(y.dtype)
        straight = y if bias is None else y - bias.view(channels).to(y.dtype)
        # Added to y, so that nothing moves by a bit while the stretch is zero.
        return y + change + stretch * (straight + change)

    def low_rank(self, scale: float) -> None:
        """The stretch makes it none."""

    def decomposed(self, w: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor] | None:
        """A, ``scale s B`` and the lengths ``|w| + scale g`` [out] of the adapted rows; none for several groups."""
        factors = super().low_rank(scale)
        lengths = row_lengths(w).to(self.gain) + scale * self.gain.detach()
        return None if factors is None else (*factors, lengths)

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "gain": self.gain}

    def _stretch(self, w: Tensor, v: Tensor, scale: float) -> Tensor:
        """``(|w| + scale g) / |v| - 1`` for each row, [out, 1 ...]."""
        with torch.no_grad():
            before, after = (t.flatten(1).to(self.gain).norm(dim=1) for t in (w, v))
            after = after.clamp_min(torch.finfo(after.dtype).tiny)
        return ((before - after + scale * self.gain) / after).view(-1, *[1] * (w.dim() - 1))
