"""CFG: away from the negative prompt, u + w (c - u).

Ho and Salimans, 2022, arXiv 2207.12598; within a window of noise levels, Kynkaanniemi et al., 2024, arXiv 2404.07724;
with a strength that changes over them, Wang et al., 2024, arXiv 2404.13040.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from visiontune.guidance.base import Base, Point, Strength
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Base):
    """Classifier-free guidance; where it does not act, the network sees the prompt alone."""

    scale: float = option(least=-1000, greatest=1000, help="w of u + w (c - u); 1 is none and costs nothing")

    def combine(self, u: Tensor, c: Tensor, w: Strength, point: Point) -> Tensor:
        return u + w * (c - u)


def build(config: Config) -> Config:
    """The term."""
    return config
