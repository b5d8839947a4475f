"""Brightness: mean luma (Rec. 601 weights) of an image, a reward whose effect one sees at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the brightness reward."""

    dark: bool = option(False, help="score darkness, 1 - brightness, instead")


def build(config: Config) -> Brightness:
    """The reward of a config."""
    return Brightness(config.dark)


class Brightness(Reward):
    """In [0, 1]; differentiable everywhere."""

    name = "brightness"
    differentiable: bool = True
    range: tuple[float, float] = (0.0, 1.0)

    def __init__(self, dark: bool = False) -> None:
        self.dark = dark

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        luma = (images.mean((2, 3)) * images.new_tensor(_LUMA)).sum(-1)
        return 1 - luma if self.dark else luma
