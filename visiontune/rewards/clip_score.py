"""CLIP score: cosine between an image and its prompt in the space of a CLIP model.

Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", EMNLP 2021; the plain cosine,
without the paper's rescaling by 2.5 and its cut at zero, so that a bad image still has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from visiontune.models.clip import ClipEncoder, load_clip
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the CLIP score."""

    model: str = option("pocket/clip", help="pocket/clip, a local folder, a Hub id, hf-hub:<id>, or <arch>/<tag>")
    backend: Literal["auto", "transformers", "open_clip"] = option("auto", help="library that loads the weights")
    revision: str | None = option(None, help="branch, tag or commit of a Hub model")


def build(config: Config) -> ClipScore:
    """The reward of a config; loads the weights."""
    return ClipScore(load_clip(config.model, config.backend, config.revision))


class ClipScore(Reward):
    """Cosine in [-1, 1]; 0.15 to 0.35 is usual for OpenAI's models. Images may have any size."""

    name = "clip_score"
    differentiable: bool = True
    range: tuple[float, float] = (-1.0, 1.0)

    def __init__(self, encoder: ClipEncoder) -> None:
        self.encoder = encoder

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        image = self.encoder.image_features(images)
        return (image * self.encoder.text_features(prompts)).sum(-1)
