"""LAION's aesthetic predictor v2: a linear read-out of CLIP ViT-L/14 image features, trained on ratings from 1 to 10.

Schuhmann, github.com/christophschuhmann/improved-aesthetic-predictor. The prompt is not read: alone, the reward
drives images away from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.models.clip import ClipEncoder, load_clip
from visiontune.models.sources import read_tensors
from visiontune.rewards._heads import linear_head
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option

_FILE = "sac+logos+ava1-l14-linearMSE.pth"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the aesthetic reward."""

    model: str = option("openai/clip-vit-large-patch14", help="folder or Hub id of the CLIP that the head reads")
    revision: str | None = option(None, help="branch, tag or commit of a Hub model")
    head: Path | None = option(None, help=f"file of the head's weights, or its folder; null: {_FILE} beside the model")


def build(config: Config) -> Aesthetic:
    """The reward of a config; loads the weights."""
    path = _find_head(config)
    return Aesthetic(load_clip(config.model, "transformers", config.revision), linear_head(read_tensors(path), path))


class Aesthetic(Reward):
    """4.5 to 7 is usual, though the head is linear and ends nowhere. Differentiable; images may have any size."""

    name = "aesthetic"
    differentiable: bool = True

    def __init__(self, encoder: ClipEncoder, head: Any) -> None:
        width = encoder.model.config.projection_dim
        if head[0].in_features != width:
            raise UserError(f"the aesthetic head reads {head[0].in_features} features; this CLIP has {width}")
        self.encoder, self.head = encoder, head
        self.range = _reach(head)

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        features = self.encoder.image_features(images)
        return self.head.to(features)(features).squeeze(-1)


def _reach(head: Any) -> tuple[float, float]:
    """Least and greatest value of a linear head over features of unit length."""
    with torch.no_grad():
        at_zero = head(torch.zeros(1, head[0].in_features)).item()
        slope = (head(torch.eye(head[0].in_features)) - at_zero).norm().item()
    return at_zero - slope, at_zero + slope


def _find_head(config: Config) -> Path:
    path = (config.head or Path(config.model)).expanduser()
    path = path / _FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"the aesthetic head is not at {path}: download {_FILE} from "
            "github.com/christophschuhmann/improved-aesthetic-predictor and set head: FILE"
        )
    return path
