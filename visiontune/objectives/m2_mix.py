"""Pictures and texts told from what lies between others, on the sphere of their features (m2-Mix, m3-Mix).

Oh, So, Byun, Lim, Shin, Jeon and Song, "Geodesic Multi-Modal Mixup for Robust Fine-Tuning", NeurIPS 2023, arXiv
2203.03897. CLIP keeps pictures and texts apart, each in a cone of its own. A point on the arc between a picture and its
text is a harder wrong answer for others than either end (equation 3), and to tell it apart fills the gap between the
cones. m3-Mix mixes neighbours of one kind besides.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from visiontune.core import Batch, Loss
from visiontune.models.contrastive import ContrastiveModel
from visiontune.objectives._contrast import (
    Comparing,
    Contrast,
    Table,
    accuracy,
    both_ways,
    choice,
    in_parts,
    table,
    unit,
)
from visiontune.objectives.base import Tools, combine
from visiontune.schema import option

# Below this sine of their angle two vectors are one, and the arc's formula is 0 / 0.
_PARALLEL = 1e-4


@dataclass(frozen=True, kw_only=True)
class Config(Contrast):
    """Options of m2-Mix; with weights of the other mixes, those of m3-Mix."""

    mix_weight: float = option(0.01, least=0, greatest=1e3, help="of what lies between pictures and their own texts")
    picture_weight: float = option(0.0, least=0, greatest=1e3, help="of pictures mixed with others (V-Mix)")
    text_weight: float = option(0.0, least=0, greatest=1e3, help="of texts mixed with others (L-Mix)")
    pair_weight: float = option(0.0, least=0, greatest=1e3, help="of pairs mixed with others (VL-Mix)")
    temperature: float = option(
        0.07, above=0, greatest=100, help="by which cosines with what lies between are divided, in the place of CLIP's"
    )
    beta: float = option(
        0.5, above=0, greatest=1e3, help="of the Beta(beta, beta) that says how far along the arc; small: near the ends"
    )


def build(config: Config) -> M2Mix:
    """The objective that ``config`` describes."""
    return M2Mix(config)


def between(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Points on the arcs between unit vectors [..., d], ``1 - share`` of the way from one to the other."""
    angle = (one * other).sum(-1, keepdim=True).clamp(-1 + 1e-7, 1 - 1e-7).acos()
    sine = angle.sin()
    arc = ((share * angle).sin() * one + ((1 - share) * angle).sin() * other) / sine
    return torch.where(sine < _PARALLEL, normalize(share * one + (1 - share) * other, dim=-1), arc)


def soft(logits: Tensor, targets: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Cross-entropy [b] with several right columns of each row, and their weights."""
    log = logits.log_softmax(1)
    return -torch.stack([weight * log.gather(1, column[:, None])[:, 0] for column, weight in targets]).sum(0)


class M2Mix(Comparing):
    """CLIP's loss, and ``mix_weight`` times that of telling pairs from points between the pairs of others."""

    NAME = "m2_mix"

    def compare(self, model: ContrastiveModel, batch: Batch, tools: Tools) -> Loss:
        config = self.config
        images = unit(in_parts(model.image_features, batch.data["image"], config.micro_batch).pooled)
        texts = unit(in_parts(model.text_features, batch.prompts, config.micro_batch).pooled)
        pairs = table(model, images, texts, batch.prompts, tools)
        # One for the batch, and the same in every process, since what is mixed is gathered.
        chance = random.Random(int(torch.randint(2**62, (), generator=tools.shared("mix"))))
        share = chance.betavariate(config.beta, config.beta)
        terms = {"contrast": both_ways(pairs, config.equal)}
        parts = {
            "mix": (config.mix_weight, lambda: self._mixed(pairs, share)),
            "pictures": (config.picture_weight, lambda: _neighbours(pairs, share, True, False)),
            "texts": (config.text_weight, lambda: _neighbours(pairs, share, False, True)),
            "pairs": (config.pair_weight, lambda: _neighbours(pairs, share, True, True)),
        }
        errors = terms["contrast"]
        for name, (weight, errors_of) in parts.items():
            if weight:
                terms[name] = errors_of()
                errors = errors + weight * terms[name]
        gap = (pairs.images.mean(0) - pairs.texts.mean(0)).norm()
        said = {"accuracy": accuracy(pairs.to_texts, pairs.same), "scale": pairs.scale, "gap": gap}
        said |= {name: value.mean() for name, value in terms.items()}
        return Loss(total=combine(errors, batch), terms={name: value.detach() for name, value in said.items()})

    def _mixed(self, pairs: Table, share: float) -> Tensor:
        """Both ways of choosing the partner among points between the pairs of others [b]."""
        points = between(pairs.images, pairs.texts, share)
        truth = (pairs.mine[0] * pairs.mine[1]).sum(1, keepdim=True)
        found = torch.zeros_like(truth[:, 0])
        for mine in pairs.mine:
            logits = (mine @ points.T).scatter(1, pairs.own[:, None], truth) / self.config.temperature
            found = found + choice(logits, pairs.own, pairs.same, self.config.equal)
        return found


def _neighbours(pairs: Table, share: float, pictures: bool, texts: bool) -> Tensor:
    """Pictures, texts or both mixed with those from the other end of the batch, and told apart both ways [b]."""
    images = between(pairs.images, pairs.images.flip(0), share) if pictures else pairs.images
    told = between(pairs.texts, pairs.texts.flip(0), share) if texts else pairs.texts
    others = len(images) - 1 - pairs.own
    weights = (1.0, 1.0) if pictures and texts else (share, 1 - share)
    targets = list(zip((pairs.own, others), weights, strict=True))
    ways = (images[pairs.own] @ told.T, told[pairs.own] @ images.T)
    return torch.stack([soft(pairs.scale * cosines, targets) for cosines in ways]).mean(0)
