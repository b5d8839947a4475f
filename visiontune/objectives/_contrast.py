"""What objectives share that compare pictures with texts: features of a batch, its pairs, and which of them are true.

A batch is a table of `b` pictures and `n` texts. Over several processes each has the rows of its own pictures and texts
and the columns of all: gradients pass through what is gathered, so that their mean over processes is the gradient of
the whole batch's loss.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

from visiontune.core import Batch, Loss
from visiontune.data.negatives import KINDS, Kind, negatives
from visiontune.models.contrastive import ContrastiveModel, Features
from visiontune.objectives.base import Needs, Supervised, Tools, compares, seed_of
from visiontune.schema import option

Equal = Literal["ignore", "positive", "negative"]
Inputs = TypeVar("Inputs", Tensor, Sequence[str])
_NEVER = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Options of whatever compares the pictures and the texts of a batch."""

    equal: Equal = option(
        "ignore",
        help="what pictures with equal captions are to each other: ignored, pairs too (positive: FLYP with class names "
        "as captions), or as wrong as others (negative: open_clip)",
    )
    micro_batch: int | None = option(
        None,
        least=1,
        greatest=65536,
        help="rows whose activations are kept at once: towers are computed again in the backward pass, in parts of so "
        "many rows, and gradients are those of the whole batch; null keeps all",
    )


@dataclass(frozen=True, kw_only=True)
class AmongFalse(Contrast):
    """Options of whatever has false captions beside the true ones."""

    negatives: list[Kind] = option(
        list(KINDS), help="false captions of each row, one of each kind: swap, replace, shuffle"
    )

    def __post_init__(self) -> None:
        if not self.negatives:
            raise ValueError("negatives names no kind: give some of swap, replace, shuffle, or take contrastive")


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Pictures and texts of all processes, and where this process's own pairs are.

    Attributes:
        own: [b] the column of each own row's partner.
        images, texts: [n, d] unit features of all. mine: the own ones, [b, d] each.
        labels: [n] numbers of the captions, equal for equal words.
        scale: of cosines.
    """

    own: Tensor
    images: Tensor
    texts: Tensor
    mine: tuple[Tensor, Tensor]
    labels: Tensor
    scale: Tensor

    @cached_property
    def to_texts(self) -> Tensor:
        """[b, n] logits of the own pictures."""
        return self.scale * self.mine[0] @ self.texts.T

    @cached_property
    def to_images(self) -> Tensor:
        """[b, n] logits of the own texts."""
        return self.scale * self.mine[1] @ self.images.T

    @cached_property
    def same(self) -> Tensor:
        """[b, n] where a caption is that of the row."""
        return self.labels[self.own][:, None] == self.labels


def in_parts(tower: Any, inputs: Inputs, size: int | None) -> Features:
    """Features of pictures or texts; with ``size`` activations are kept of so many rows at a time (GradCache, Gao et
    al., 2021, arXiv 2101.06983: the same gradients, in the order of one checkpoint for each part)."""
    if size is None or size >= len(inputs) or not torch.is_grad_enabled():
        found: Features = tower(inputs)
        return found
    parts = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    return Features.cat([checkpoint(tower, part, use_reentrant=False) for part in parts])


def unit(features: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis, in float32 at least."""
    return normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def table(model: ContrastiveModel, images: Tensor, texts: Tensor, prompts: Sequence[str], tools: Tools) -> Table:
    """The table of a batch.

    Args:
        images, texts: [b, d] unit features of this process's pairs. prompts: their captions.
    """
    labels = torch.tensor([seed_of(prompt) for prompt in prompts], device=images.device)
    own = torch.arange(len(images), device=images.device) + tools.rank * len(images)
    return Table(
        own=own,
        images=gathered(images, tools),
        texts=gathered(texts, tools),
        mine=(images, texts),
        labels=tools.gather(labels),
        scale=model.logit_scale.float() if images.dtype != torch.float64 else model.logit_scale,
    )


def gathered(values: Tensor, tools: Tools) -> Tensor:
    """The rows of all processes, in the order of their ranks, with a gradient."""
    if tools.world == 1:
        return values
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(values))


def choice(logits: Tensor, own: Tensor, same: Tensor, equal: Equal = "ignore") -> Tensor:
    """Cross-entropy [b] of choosing the own one of each row.

    Args:
        logits: [b, n]. own: [b] its column. same: [b, n] columns that are as right, the own one among them.
        equal: what these are taken for.
    """
    if equal == "positive":
        return -(logits.log_softmax(1) * same / same.sum(1, keepdim=True)).nan_to_num(0.0).sum(1)
    if equal == "ignore":
        others = same.scatter(1, own[:, None], False)
        logits = logits.masked_fill(others, _NEVER)
    return cross_entropy(logits, own, reduction="none")


def both_ways(pairs: Table, equal: Equal) -> Tensor:
    """The symmetric loss of CLIP [b]: half of choosing the text of each picture, half of the other way round."""
    return (
        choice(pairs.to_texts, pairs.own, pairs.same, equal) + choice(pairs.to_images, pairs.own, pairs.same, equal)
    ) / 2


def accuracy(logits: Tensor, same: Tensor) -> Tensor:
    """Share of rows whose best column is right; a detached scalar."""
    return same.gather(1, logits.detach().argmax(1, keepdim=True)).float().mean()


@dataclass(frozen=True, kw_only=True, eq=False)
class Wrong:
    """False captions of a batch, ``k`` of each row.

    Attributes:
        texts: b * k of them, those of a row together; that of the row where a kind has none.
        valid: bool [b, k], where there is one.
    """

    texts: list[str]
    valid: Tensor


def wrong(batch: Batch, kinds: Sequence[Kind], tools: Tools) -> Wrong:
    """One false caption of each kind for each row, another at every visit."""
    rng = random.Random(int(torch.randint(2**62, (), generator=tools.rng)))
    found = [negatives(prompt, kinds, rng) for prompt in batch.prompts]
    texts = [text or prompt for prompt, row in zip(batch.prompts, found, strict=True) for text in row]
    valid = torch.tensor([[text is not None for text in row] for row in found], device=batch.data["image"].device)
    return Wrong(texts=texts, valid=valid)


class Comparing(Supervised):
    """An objective that tells the pictures and texts of a batch apart.

    Attributes:
        NAME: the objective's.
    """

    NAME: ClassVar[str]

    def __init__(self, config: Contrast) -> None:
        self.config: Any = config

    @property
    def needs(self) -> Needs:
        return Needs(columns=("image",), together=True)

    def check(self, model: Any, reward: Any) -> None:
        super().check(model, reward)
        compares(model, self.NAME)

    def loss(self, model: Any, batch: Batch, tools: Tools) -> Loss:
        model.clamp()
        # Towers compute in the precision of the run, and logits, which are large, never in half of one.
        with torch.autocast(batch.data["image"].device.type, enabled=False):
            return self.compare(model, batch, tools)

    @abstractmethod
    def compare(self, model: ContrastiveModel, batch: Batch, tools: Tools) -> Loss:
        """The loss of a batch, of the model's own features."""
