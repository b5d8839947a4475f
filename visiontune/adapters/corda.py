"""CorDA: a low-rank change that starts at components of the weight, as the task's inputs or the prior's weigh them.

Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-
Efficient Fine-tuning", arXiv 2406.05223.

    W F = U S V^T,   F = C or C^(1/2),   C = (1/n) sum_x x x^T + damping,   s B0 A0 = U_T S_T V_T^T F^-1
    W' = W + s (B A - B0 A0) = W + s (dB A + B0 dA),   A = A0 + dA,  B = B0 + dB,  s = alpha / r

T are the largest r components (``ipm``, with batches of the task) or the smallest (``kpm``, with batches of what is to
be kept). The trained dA and dB start at zero, so the start is the base bit for bit; the paper takes s B0 A0 out of the
base instead. C is divided by the mean of its diagonal first, so that the size of the inputs does not shift the balance
of A0 and B0, and C = I, PiSSA's start (arXiv 2404.02948), holds until the adapter is prepared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.adapters._evidence import Evidence
from visiontune.adapters._low_rank import LAYERS, Difference, full_rank, matrices
from visiontune.adapters._method import must_start
from visiontune.adapters.base import Method
from visiontune.schema import option

__all__ = ["LAYERS", "Config", "build"]
LACKING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of CorDA; r (in + out) parameters for each linear layer."""

    rank: int = option(
        16, least=1, greatest=16384, help="r, at most the smaller side of a weight; the change has rank 2 r"
    )
    alpha: float | None = option(
        None, above=0, greatest=1e6, help="strength: the change is multiplied by alpha / rank; default: rank"
    )
    mode: Literal["ipm", "kpm"] = option("ipm", help="train the largest components (ipm) or the smallest (kpm)")
    root: bool = option(False, help="weigh by C^(1/2), the error of the layer's outputs, instead of C")
    damping: float = option(0.01, above=0, greatest=1e6, help="added to the diagonal of C, relative to its mean")
    batches: int = option(16, least=1, greatest=1_000_000, help="how many batches are looked at")

    @property
    def strength(self) -> float:
        """s in the module's equation."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """CorDA for the layers of one component, with C = I until it is prepared."""
    return CorDA({name: Components(config, layer) for name, layer in layers.items()})


class CorDA(Method):
    """The differences of one component's layers."""

    plans = True

    def prepare(self, evidence: Evidence) -> None:
        """Start at the components that the inputs weigh."""
        for portion in evidence.portions():
            for name, moments in portion.items():
                adapter = self.adapters[name]
                assert isinstance(adapter, Components)
                adapter.start(evidence.layers[name], moments.second.cpu().double())


class Components(Difference):
    """A difference that starts at components of the weight."""

    def __init__(self, config: Config, layer: Any) -> None:
        super().__init__(layer, min(config.rank, full_rank(layer)), config.strength)
        self.config = config
        if must_start():
            self.start(layer, [None] * self.groups)

    def start(self, layer: Any, seconds: Iterable[Tensor | None]) -> None:
        """Begin at components of the weight by second moments [d, d] of each group's inputs, of any scale."""
        parts, rank = matrices(layer, layer.weight), self.up.shape[1]
        pairs = [components(w, second, rank, self.config) for w, second in zip(parts, seconds, strict=True)]
        self.up0.copy_(torch.cat([up for up, _ in pairs]))
        self.down0.copy_(torch.cat([down for _, down in pairs]).reshape(self.down0.shape))


def components(w: Tensor, second: Tensor | None, rank: int, config: Config) -> tuple[Tensor, Tensor]:
    """B0 [out, rank] and A0 [rank, d] of w [out, d]; C = I for no second moments, or moments of zero."""
    if second is None or not second.any():
        u, s, v = torch.linalg.svd(w, full_matrices=False)
    else:
        values, q = torch.linalg.eigh(second / second.diagonal().mean())
        values = values.clamp_min(0) + config.damping
        weights = values.sqrt() if config.root else values
        # With F = Q diag(weights) Q^T, W F and this have the same U and S, and right vectors that differ by Q.
        u, s, v = torch.linalg.svd((w @ q) * weights, full_matrices=False)
        v = (v / weights) @ q.mT
    lacking = s <= LACKING * s[0]
    chosen = slice(rank) if config.mode == "ipm" else slice(len(s) - rank, None)
    u, s, v, lacking = u[:, chosen], (s[chosen] / config.strength).sqrt(), v[chosen], lacking[chosen]
    # Both factors of a component that the weight lacks would be zero and stay it; one is enough for the same product.
    return torch.where(lacking, 0.0, u * s), torch.where(lacking[:, None], F.normalize(v), s[:, None] * v)
