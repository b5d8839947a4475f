"""AutoLoRA: the rank of each layer's LoRA by a bi-level search over its rank-one terms.

Zhang et al., "AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation Based on Meta Learning", NAACL 2024,
arXiv 2403.09113; the details below are unverified.

    W' = W + s sum_j a_j b_j a_j^T,    a = softmax(logits) for each layer, j = 1 ... k

    inner, on the first half of the batches:    w' = w - xi dL_train/dw (w, logits),    w = all factors
    outer, on the second half:                  d/dlogits L_val(w - xi dL_train/dw (w, logits), logits)
                                                = dL_val/dlogits - xi d2L_train/(dlogits dw) v,    v = dL_val/dw'

The Hessian product is a central difference of dL_train/dlogits along v, as in DARTS (arXiv 1806.09055, equation 8), so
a step costs four forward and backward passes. A layer's rank is then the number of its a_j >= 1/k, at least one, and
training starts from fresh LoRAs of these ranks. xi is set anew in each step, such that the inner step's root mean
square is ``lr``; it counts as constant in the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visiontune.adapters import _slots, lora
from visiontune.adapters._evidence import Evidence
from visiontune.adapters._layers import CONVOLUTIONS, masters
from visiontune.adapters._slots import Slots
from visiontune.adapters.base import Method
from visiontune.errors import UserError
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
# Length of the central difference's step, as in DARTS.
STEP = 0.01

Gradients = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Config(_slots.Config):
    """Options of AutoLoRA and of LoRA; at most LoRA's parameters."""

    rank: int = option(
        8, least=1, greatest=16384, help="k, the rank-one terms of each layer, of which those that matter are kept"
    )
    search_steps: int = option(
        64, least=1, greatest=1_000_000, help="steps of the search, of four forward and backward passes each"
    )
    lr: float = option(1e-3, above=0, greatest=100, help="root mean square of an inner step, on the factors")
    search_lr: float = option(
        0.05, above=0, greatest=100, help="learning rate of the selection weights (Adam on their logits)"
    )
    unrolled: bool = option(True, help="look through the inner step; false: first order, half as many passes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 2:
            raise ValueError("batches must be at least 2: one to train on and one to choose by")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """AutoLoRA for the layers of one component: LoRA until it is prepared."""
    return AutoLoRA(config, layers)


class AutoLoRA(Slots):
    """LoRAs of searched ranks."""

    config: Config

    def prepare(self, evidence: Evidence) -> None:
        """Choose the ranks.

        Raises:
            UserError: a layer takes no part in the loss.
        """
        terms = {name: Terms(self.config, layer) for name, layer in self.layers.items()}
        for name, slot in self.slots.items():
            slot.put(terms[name])
        search(self.config, terms, evidence)
        self.put_ranks({name: term.kept() for name, term in terms.items()})


class Terms(lora.LoRA):
    """LoRA whose rank-one terms are weighed by a softmax of ``logits`` [k]."""

    def __init__(self, config: Config, layer: nn.Module) -> None:
        super().__init__(lora.Config(rank=config.rank), layer)
        self.strength = config.strength
        self.logits = nn.Parameter(torch.zeros(config.rank, **masters(layer)))

    def final_up(self) -> Tensor:
        """B with its columns weighed."""
        return self.up * self.logits.softmax(0)

    def active_up(self) -> Tensor:
        """The same."""
        return self.final_up()

    @torch.no_grad()
    def kept(self) -> int:
        """How many terms weigh no less than the mean, up to rounding."""
        return int((self.logits.softmax(0) * self.rank >= 1 - 1e-6).sum())


def search(config: Config, terms: Mapping[str, Terms], evidence: Evidence) -> None:
    """Train the factors and the logits side by side."""
    middle = len(evidence.losses) // 2
    train, held = evidence.losses[:middle], evidence.losses[middle:]
    level = Bilevel(terms, evidence.reduce)
    optimizer = torch.optim.Adam(level.logits, config.search_lr)
    for step in range(config.search_steps):
        gradients = level.step(train[step % len(train)], held[step % len(held)], config.lr, config.unrolled)
        for logits, gradient in zip(level.logits, gradients, strict=True):
            logits.grad = gradient
        optimizer.step()


class Bilevel:
    """The two levels' parameters and their gradients."""

    def __init__(self, terms: Mapping[str, Terms], reduce: Callable[[Tensor], Tensor]) -> None:
        self.terms, self.reduce = terms, reduce
        self.logits = [term.logits for term in terms.values()]
        self.factors = [factor for term in terms.values() for factor in (term.up, term.down)]

    def step(self, train: Callable[[], Tensor], held: Callable[[], Tensor], lr: float, unrolled: bool) -> Gradients:
        """Take the inner step and return the outer gradient, that of the held-out loss by the logits."""
        before = [factor.detach().clone() for factor in self.factors]
        slope = self.gradients(train, self.factors)
        size = math.sqrt(sum(g.numel() for g in slope))
        rate = lr * size / max(_norm(slope), torch.finfo(slope[0].dtype).tiny)
        after = [w - rate * g for w, g in zip(before, slope, strict=True)]
        self.put(after)
        both = self.gradients(held, [*self.logits, *self.factors])
        outer, along = both[: len(self.logits)], both[len(self.logits) :]
        if unrolled and (length := _norm(along)):
            product = self.product(train, before, along, STEP / length)
            outer = [d - rate * p for d, p in zip(outer, product, strict=True)]
            self.put(after)
        return outer

    def product(self, loss: Callable[[], Tensor], at: Gradients, along: Gradients, step: float) -> Gradients:
        """``d2L/(dlogits dw) v`` at the factors ``at`` along ``v``; the factors are moved."""
        ends = []
        for sign in (1.0, -1.0):
            self.put([w + sign * step * v for w, v in zip(at, along, strict=True)])
            ends.append(self.gradients(loss, self.logits))
        return [(up - down) / (2 * step) for up, down in zip(*ends, strict=True)]

    def gradients(self, loss: Callable[[], Tensor], of: Sequence[nn.Parameter]) -> Gradients:
        """Sums over the processes."""
        found = torch.autograd.grad(loss(), of, allow_unused=True)
        unused = {id(p) for p, gradient in zip(of, found, strict=True) if gradient is None}
        for name, term in self.terms.items():
            if not unused.isdisjoint(map(id, term.parameters())):
                raise UserError(f"layer '{name}' takes no part in the loss: leave it out of adapter.targets")
        return [self.reduce(gradient) for gradient in found]

    @torch.no_grad()
    def put(self, values: Gradients) -> None:
        """Give the factors these values."""
        for factor, value in zip(self.factors, values, strict=True):
            factor.copy_(value)


def _norm(tensors: Gradients) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
