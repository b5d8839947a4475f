"""Text encoders that were tuned apart, in shares that are chosen when pictures are drawn.

    emb(c) = (1 - sum_i w_i) T_0(c) + sum_i w_i T_i(c)

with T_0 the base's text encoders and T_i the same under one adapter set: TextCraftor (Li et al., 2024, arXiv
2403.18978). ``AdapterSet.scale`` is something else: it scales the change of the weights, before the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visiontune.adapters.base import AdapterSet
from visiontune.core import Condition

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel


@torch.no_grad()
def blended(model: PipelineModel, prompts: Sequence[str], weights: Mapping[AdapterSet, float]) -> Condition:
    """The conditions of ``prompts``, mixed.

    An encoder of weight 0 is not run and leaves no trace: with all weights 0 these are the base's conditions bit for
    bit, and with a single weight of 1 those of that set.

    Args:
        model: with the sets attached. prompts: b texts.
        weights: share of each set; what they lack to 1 is the base's share.
    """
    shares: list[tuple[AdapterSet | None, float]] = [(None, 1.0 - sum(weights.values())), *weights.items()]
    parts = []
    for chosen, share in shares:
        if share:
            with _only(chosen, weights):
                parts.append((model.embed(prompts), share))
    first = parts[0][0]
    tokens = _sum([(cond.tokens, share) for cond, share in parts])
    if first.pooled is None:
        return replace(first, tokens=tokens)
    return replace(first, tokens=tokens, pooled=_sum([(c.pooled, share) for c, share in parts if c.pooled is not None]))


def _sum(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    value, share = parts[0]
    total = share * value
    for value, share in parts[1:]:
        total = total + share * value
    return total


@contextmanager
def _only(chosen: AdapterSet | None, sets: Mapping[AdapterSet, float]) -> Iterator[None]:
    with ExitStack() as stack:
        for other in sets:
            if other is not chosen:
                stack.enter_context(other.disable())
        yield
