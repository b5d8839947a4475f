"""False captions told from true ones by what each word finds in the picture, and softly (FSC-CLIP).

Oh et al., "Preserving Multi-Modal Capabilities of Pre-trained VLMs for Improving Vision-Linguistic Compositionality",
2024, arXiv 2410.05210. To push false captions away from the vector of the whole picture costs what it knows otherwise.
So each word looks the picture's patches over (equations 4 and 5), a caption counts by the sum over its words, and the
loss on false captions is weak where they are told apart already, and never wants certainty (equations 6 and 7). The
authors' code leaves captions that are missing in the softmax with logit 0; here they are out of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from visiontune.core import Batch, Loss
from visiontune.models.contrastive import ContrastiveModel, Features
from visiontune.objectives._contrast import (
    AmongFalse,
    Comparing,
    accuracy,
    both_ways,
    in_parts,
    table,
    unit,
    wrong,
)
from visiontune.objectives.base import Tools, combine, mean_where
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(AmongFalse):
    """Options of FSC-CLIP; the defaults are the authors' for ViT-B/32 on COCO."""

    global_weight: float = option(0.5, least=0, greatest=1e3, help="of false captions by the whole picture")
    local_weight: float = option(0.2, least=0, greatest=1e3, help="of false captions by patches and words")
    gamma: float = option(2.0, least=0, greatest=100, help="how much less counts what is told apart (focal loss)")
    smoothing: float = option(0.02, least=0, below=1, help="share of the target that false captions have")


def build(config: Config) -> FscClip:
    """The objective that ``config`` describes."""
    return FscClip(config)


def local_scores(images: Tensor, texts: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """How well captions fit a picture, word by word, [b, k]; gradients do not pass through where words look.

    Args:
        images: [b, p, d] unit features of patches.
        texts: [b, k, n, d] unit features of the words of each row's captions. mask: [b, k, n] which are words.
        scale: of cosines.
    """
    seen = torch.einsum("bknd,bpd->bknp", texts, images).detach()
    low, high = seen.amin(-1, keepdim=True), seen.amax(-1, keepdim=True)
    # A picture that is the same everywhere is looked at evenly.
    tiny = torch.finfo(seen.dtype).eps
    looked = (seen - low + tiny) / (high - low + tiny)
    looked = looked / looked.sum(-1, keepdim=True)
    found = normalize(torch.einsum("bknp,bpd->bknd", looked, images), dim=-1)
    fit = scale * (found * texts).sum(-1)
    return fit.masked_fill(~mask, float("-inf")).logsumexp(-1)


def soft_choice(logits: Tensor, valid: Tensor, gamma: float, smoothing: float) -> Tensor:
    """Focal cross-entropy [b] of the first of each row's captions, with a smoothed target.

    Args:
        logits: [b, 1 + k], the true caption's first. valid: bool [b, k], which others there are.
        gamma: 0 is cross-entropy. smoothing: share of the target that is spread over all.
    """
    there = torch.cat([torch.ones_like(valid[:, :1]), valid], 1)
    log = logits.masked_fill(~there, float("-inf")).log_softmax(1)
    target = smoothing * there / there.sum(1, keepdim=True)
    target = torch.cat([target[:, :1] + 1 - smoothing, target[:, 1:]], 1)
    # What is not there has the logarithm of nothing, and a share of nothing.
    log = log.masked_fill(~there, 0.0)
    return -(target * (1 - log.exp() * there).clamp(min=0) ** gamma * log).sum(1)


class FscClip(Comparing):
    """``L_clip + global_weight * SCR(global logits) + local_weight * SCR(local logits)``, equation 8."""

    NAME = "fsc_clip"

    def compare(self, model: ContrastiveModel, batch: Batch, tools: Tools) -> Loss:
        config, rows = self.config, len(batch)
        false = wrong(batch, config.negatives, tools)
        shown = in_parts(model.image_features, batch.data["image"], config.micro_batch)
        told = in_parts(model.text_features, [*batch.prompts, *false.texts], config.micro_batch)
        images, texts = unit(shown.pooled), unit(told.pooled)
        pairs = table(model, images, texts[:rows], batch.prompts, tools)
        captions = _beside(texts, rows)
        whole = pairs.scale * torch.einsum("bd,bkd->bk", images, captions)
        terms = {"contrast": both_ways(pairs, config.equal), "global": self._apart(whole, false.valid)}
        if config.local_weight:
            terms["local"] = self._apart(_local(shown, told, rows, pairs.scale), false.valid)
        any_false = false.valid.any(1)
        weights = {"contrast": 1.0, "global": config.global_weight, "local": config.local_weight}
        errors = sum(weights[name] * value for name, value in terms.items())
        assert isinstance(errors, Tensor)
        said = {name: value.detach().mean() for name, value in terms.items()}
        best = whole.detach().masked_fill(~torch.cat([any_false[:, None], false.valid], 1), float("-inf")).argmax(1)
        said |= {
            "accuracy": accuracy(pairs.to_texts, pairs.same),
            "told_apart": mean_where((best == 0).float(), any_false),
            "negatives": false.valid.float().mean(),
            "scale": pairs.scale.detach(),
        }
        return Loss(total=combine(errors, batch), terms=said)

    def _apart(self, logits: Tensor, valid: Tensor) -> Tensor:
        """The loss on each row's false captions, so that the mean over all rows is that over those that have some."""
        some = valid.any(1)
        found = soft_choice(logits, valid, self.config.gamma, self.config.smoothing)
        return torch.where(some, found, 0) * len(some) / some.sum().clamp(min=1)


def _beside(texts: Tensor, rows: int) -> Tensor:
    """[b, 1 + k, ...] of features of b true captions and then b * k false ones."""
    return torch.cat([texts[:rows, None], texts[rows:].unflatten(0, (rows, -1))], 1)


def _local(shown: Features, told: Features, rows: int, scale: Tensor) -> Tensor:
    assert told.mask is not None
    return local_scores(unit(shown.dense), _beside(unit(told.dense), rows), _beside(told.mask, rows), scale)
