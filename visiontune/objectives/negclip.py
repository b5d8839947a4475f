"""The contrastive loss with false captions beside the true ones.

Yuksekgonul et al., "When and why vision-language models behave like bags-of-words, and what to do about it", 2022,
arXiv 2210.01936, section 4: false captions are further columns that pictures choose from. Those of the paper exchange
phrases that a tagger finds; ours are :mod:`visiontune.data.negatives`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from visiontune.core import Batch, Loss
from visiontune.data.negatives import Kind
from visiontune.models.contrastive import ContrastiveModel
from visiontune.objectives._contrast import (
    AmongFalse,
    Comparing,
    accuracy,
    choice,
    gathered,
    in_parts,
    table,
    unit,
    wrong,
)
from visiontune.objectives.base import Tools, combine
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(AmongFalse):
    """Options of the loss with false captions."""

    negatives: list[Kind] = option(
        ["swap"], help="false captions of each row, one of each kind: swap, replace, shuffle"
    )


def build(config: Config) -> NegClip:
    """The objective that ``config`` describes."""
    return NegClip(config)


class NegClip(Comparing):
    """CLIP's loss, in which each picture chooses among the false captions of all rows too."""

    NAME = "negclip"

    def compare(self, model: ContrastiveModel, batch: Batch, tools: Tools) -> Loss:
        size, rows = self.config.micro_batch, len(batch)
        false = wrong(batch, self.config.negatives, tools)
        images = unit(in_parts(model.image_features, batch.data["image"], size).pooled)
        told = unit(in_parts(model.text_features, [*batch.prompts, *false.texts], size).pooled)
        pairs = table(model, images, told[:rows], batch.prompts, tools)
        others = gathered(told[rows:], tools)
        valid = tools.gather(false.valid.flatten())
        wider = (pairs.scale * images @ others.T).masked_fill(~valid, float("-inf"))
        logits = torch.cat([pairs.to_texts, wider], 1)
        same = torch.cat([pairs.same, torch.zeros_like(wider, dtype=torch.bool)], 1)
        equal = self.config.equal
        errors = (choice(logits, pairs.own, same, equal) + choice(pairs.to_images, pairs.own, pairs.same, equal)) / 2
        found = {
            "accuracy": accuracy(pairs.to_texts, pairs.same),
            "told_apart": accuracy(logits, same),
            "negatives": false.valid.float().mean(),
            "scale": pairs.scale.detach(),
        }
        return Loss(total=combine(errors, batch), terms=found)
