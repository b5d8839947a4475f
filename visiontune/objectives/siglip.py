"""Each picture and text of a batch asked whether they belong together.

Zhai, Mustafa, Kolesnikov and Beyer, "Sigmoid Loss for Language Image Pre-Training", 2023, arXiv 2303.15343, equation 1:
no softmax, so a pair's loss does not depend on the other pairs, and a batch needs no common normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from visiontune.core import Batch, Loss
from visiontune.errors import UserError
from visiontune.models.contrastive import ContrastiveModel
from visiontune.objectives._contrast import Comparing, Contrast, Equal, accuracy, in_parts, table, unit
from visiontune.objectives.base import Tools, combine


@dataclass(frozen=True, kw_only=True)
class Config(Contrast):
    """Options of the sigmoid loss."""


def build(config: Config) -> Siglip:
    """The objective that ``config`` describes."""
    return Siglip(config)


def pairs_apart(logits: Tensor, own: Tensor, same: Tensor, equal: Equal) -> Tensor:
    """Sum over each row's pairs of ``-log sigmoid(+-logit)`` [b].

    Args:
        logits: [b, n]. own: [b] each row's partner. same: [b, n] where captions are equal.
        equal: whether those are yes too, are not asked, or are no.
    """
    yes = torch.zeros_like(same).scatter(1, own[:, None], True)
    asked = torch.ones_like(same) if equal != "ignore" else ~same | yes
    right = same if equal == "positive" else yes
    return -(logsigmoid(torch.where(right, logits, -logits)) * asked).sum(1)


class Siglip(Comparing):
    """``-1/b sum over i, j of log sigmoid(z_ij (s v_i . t_j + bias))`` with z = 1 for pairs and -1 for all others."""

    NAME = "siglip"

    def check(self, model: Any, reward: Any) -> None:
        super().check(model, reward)
        if model.logit_bias is None:
            raise UserError(
                f"objective=siglip is for models with a bias of their logits, and '{model.source}' ({model.family}) "
                "has none: take contrastive"
            )

    def compare(self, model: ContrastiveModel, batch: Batch, tools: Tools) -> Loss:
        size = self.config.micro_batch
        images = unit(in_parts(model.image_features, batch.data["image"], size).pooled)
        texts = unit(in_parts(model.text_features, batch.prompts, size).pooled)
        pairs = table(model, images, texts, batch.prompts, tools)
        assert model.logit_bias is not None
        bias = model.logit_bias.to(images)
        errors = pairs_apart(pairs.to_texts + bias, pairs.own, pairs.same, self.config.equal)
        terms = {"accuracy": accuracy(pairs.to_texts, pairs.same), "scale": pairs.scale.detach()}
        return Loss(total=combine(errors, batch), terms={**terms, "bias": bias.detach()})
