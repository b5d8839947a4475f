"""Diversity: how far an image lies from the others of its prompt, on average.

``pixels`` takes the mean absolute difference, ``clip`` one minus the cosine of CLIP image features. The mean over a
group is its mean pairwise distance. It says nothing of quality: mix it with a reward that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.models.clip import ClipEncoder, load_clip
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the diversity reward."""

    features: Literal["pixels", "clip"] = option("pixels", help="what is compared")
    model: str = option("pocket/clip", help="the CLIP of features clip: pocket/clip, a folder or a Hub id")
    revision: str | None = option(None, help="branch, tag or commit of a Hub model")


def build(config: Config) -> Diversity:
    """The reward of a config; loads the weights that it needs."""
    return Diversity(load_clip(config.model, revision=config.revision) if config.features == "clip" else None)


class Diversity(Reward):
    """Groupwise: images of one prompt, at least two, must come in one batch. Pixels in [0, 1], CLIP in [0, 2]."""

    name = "diversity"
    differentiable: bool = True
    groupwise: bool = True
    range: tuple[float, float] = (0.0, 2.0)

    def __init__(self, encoder: ClipEncoder | None = None) -> None:
        self.encoder = encoder
        self.range = (0.0, 2.0) if encoder else (0.0, 1.0)

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        features = self.encoder.image_features(images) if self.encoder else images.flatten(1)
        scores: list[Tensor] = [images.new_zeros(())] * len(images)
        for prompt in dict.fromkeys(prompts):
            members = [i for i, other in enumerate(prompts) if other == prompt]
            if len(members) < 2:
                raise UserError(f"reward '{self.name}' compares images of one prompt; '{prompt[:60]}' has only one")
            for i, distance in zip(members, self._distances(features[members]), strict=True):
                scores[i] = distance
        return torch.stack(scores)

    def _distances(self, features: Tensor) -> Tensor:
        """Mean distance ``[n]`` of each of n feature vectors from the others."""
        if self.encoder:
            pairs = 1 - features @ features.T
        else:
            pairs = torch.stack([(features - own).abs().mean(1) for own in features])
        # The distance from itself is zero; rounding may take it below.
        return pairs.clamp(min=0).sum(1) / (len(features) - 1)
