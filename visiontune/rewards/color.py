"""How much of an image has a named colour, softly, or how strong one of its channels is.

``share`` is the mean over pixels of ``exp(-|x - c|^2 / (2 width^2))`` for RGB values x and the colour c: about the
fraction of pixels of that colour, with a gradient for those that are near. ``channel`` is the mean of the red, green or
blue channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from visiontune.errors import UserError
from visiontune.pocket.world import COLORS
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import nearest, option

_CHANNELS = ("red", "green", "blue")
_NAMED = {name: tuple(v / 255 for v in rgb) for name, rgb in COLORS.items()}
_NAMED |= {"black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the colour reward."""

    color: str = option("red", help="a colour of the pocket world, black, white, or three numbers such as '0.2 0.5 1'")
    measure: Literal["share", "channel"] = option("share", help="soft share of pixels, or mean of a channel")
    width: float = option(
        0.25, above=0, greatest=100, help="distance in RGB at which a pixel counts 0.61 of a whole one"
    )

    def __post_init__(self) -> None:
        if self.measure == "channel" and self.color not in _CHANNELS:
            raise UserError(f"measure 'channel' takes the color red, green or blue, not '{self.color}'")
        _rgb(self.color)


def build(config: Config) -> Color:
    """The reward of a config."""
    return Color(config)


class Color(Reward):
    """In [0, 1]; differentiable, though the share hardly has a gradient where no pixel is near the colour."""

    name = "color"
    differentiable: bool = True
    range: tuple[float, float] = (0.0, 1.0)

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        if self.config.measure == "channel":
            return images[:, _CHANNELS.index(self.config.color)].mean((1, 2))
        color = images.new_tensor(_rgb(self.config.color)).view(1, 3, 1, 1)
        distance = (images - color).square().sum(1)
        return (-distance / (2 * self.config.width**2)).exp().mean((1, 2))


def _rgb(color: str) -> tuple[float, ...]:
    if color in _NAMED:
        return _NAMED[color]
    try:
        rgb = tuple(map(float, color.replace(",", " ").split()))
    except ValueError:
        rgb = ()
    if len(rgb) != 3 or not all(0 <= v <= 1 for v in rgb):
        raise UserError(f"color '{color}' is no colour and not three numbers in [0, 1]{nearest(color, _NAMED)}")
    return rgb
