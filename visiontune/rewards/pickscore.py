"""PickScore: a CLIP ViT-H/14 trained on which of two images people picked.

Kirstain et al., "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", NeurIPS 2023:
``exp(logit_scale) * cos(image, prompt)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from visiontune.models.clip import ClipEncoder, load_clip
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of PickScore."""

    model: str = option("yuvalkirstain/PickScore_v1", help="folder or Hub id of the transformers CLIP model")
    tokenizer: str = option(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", help="folder or Hub id of its tokenizer, if the model has none"
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub model")
    cosine: bool = option(False, help="leave the factor exp(logit_scale), about 100, out")


def build(config: Config) -> PickScore:
    """The reward of a config; loads the weights."""
    return PickScore(load_clip(config.model, "transformers", config.revision, config.tokenizer), config.cosine)


class PickScore(Reward):
    """17 to 24 is usual (0.17 to 0.27 as a cosine). Differentiable; images may have any size."""

    name = "pickscore"
    differentiable: bool = True
    range: tuple[float, float] = (-100.0, 100.0)

    def __init__(self, encoder: ClipEncoder, cosine: bool = False) -> None:
        self.encoder = encoder
        self.scale = 1.0 if cosine else encoder.model.logit_scale.exp().item()
        self.range = (-self.scale, self.scale)

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        image = self.encoder.image_features(images)
        return self.scale * (image * self.encoder.text_features(prompts)).sum(-1)
