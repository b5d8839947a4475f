"""Size of an image as a JPEG file in kB (1000 bytes): the black-box reward of DDPO.

Black et al., "Training Diffusion Models with Reinforcement Learning", ICLR 2024: compressibility is minus the size,
incompressibility the size. The encoder sees bytes, so no gradient reaches the pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visiontune.ops.pixels import to_uint8
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the JPEG reward."""

    goal: Literal["compressible", "incompressible"] = option("compressible", help="which images score high")
    quality: int = option(95, least=1, greatest=95, help="JPEG quality, 1 to 95")


def build(config: Config) -> Jpeg:
    """The reward of a config."""
    return Jpeg(config.goal == "compressible", config.quality)


class Jpeg(Reward):
    """In kB; at most 0 for compressibility, at least 0 for incompressibility. Compare images of one size only."""

    name = "jpeg"

    def __init__(self, compressible: bool = True, quality: int = 95) -> None:
        self.sign, self.quality = -1 if compressible else 1, quality
        self.range = (float("-inf"), 0.0) if compressible else (0.0, float("inf"))

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        return torch.tensor([self.sign * self._kilobytes(picture) for picture in to_uint8(images)])

    def _kilobytes(self, picture: np.ndarray) -> float:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "jpeg", quality=self.quality)
        return file.tell() / 1000
