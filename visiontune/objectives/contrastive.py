"""Pictures and their captions told from the others of a batch.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, arXiv 2103.00020, figure
3. With class names as captions that is FLYP: Goyal et al., "Finetune like you pretrain", 2022, arXiv 2212.00638; with
one tower trained, LiT: Zhai et al., 2021, arXiv 2111.07991.
"""

from __future__ import annotations

from dataclasses import dataclass

from visiontune.core import Batch, Loss
from visiontune.models.contrastive import ContrastiveModel
from visiontune.objectives._contrast import Comparing, Contrast, accuracy, both_ways, in_parts, table, unit
from visiontune.objectives.base import Tools, combine


@dataclass(frozen=True, kw_only=True)
class Config(Contrast):
    """Options of the contrastive loss."""


def build(config: Config) -> Contrastive:
    """The objective that ``config`` describes."""
    return Contrastive(config)


class Contrastive(Comparing):
    """``mean over rows of weight * (CE(s v_i . t_j, i) + CE(s t_i . v_j, i)) / 2`` with unit features v and t."""

    NAME = "contrastive"

    def compare(self, model: ContrastiveModel, batch: Batch, tools: Tools) -> Loss:
        size = self.config.micro_batch
        images = unit(in_parts(model.image_features, batch.data["image"], size).pooled)
        texts = unit(in_parts(model.text_features, batch.prompts, size).pooled)
        pairs = table(model, images, texts, batch.prompts, tools)
        total = combine(both_ways(pairs, self.config.equal), batch)
        return Loss(
            total=total, terms={"accuracy": accuracy(pairs.to_texts, pairs.same), "scale": pairs.scale.detach()}
        )
