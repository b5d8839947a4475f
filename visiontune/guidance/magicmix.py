"""MagicMix: what the prompt says, in the layout of a picture.

Liew et al., 2022, arXiv 2210.16056: down to a level k_max the latents are those of the picture, noised; from there to
k_min they are pulled back to it where every step starts, nu x + (1 - nu) (alpha x_0 + sigma n); then the prompt is
free. n is the noise that the run started from, the same throughout, so that two noised latents mix to the variance of
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.guidance._pictures import check_picture, latents_of
from visiontune.guidance.base import Edit, Point, Strength
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Edit):
    """The layout of a picture, pulled back to between two levels of noise."""

    STARTS = True

    scale: float = option(
        0.5, least=0, greatest=1, help="1 - nu, how much of the layout is mixed in; 0 is a free drawing"
    )
    picture: Any = option(help="file of the picture whose layout it is, in the ratio of what is drawn")
    k_max: float = option(0.6, least=0, greatest=1, help="level of noise above which there is the layout alone")
    k_min: float = option(0.3, least=0, greatest=1, help="level of noise down to which they are pulled back to it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k_min > self.k_max:
            raise UserError(f"magicmix: k_min {self.k_min:g} must not be above k_max {self.k_max:g}")

    def edit(self, x: Tensor, s: Strength, point: Point) -> Tensor:
        assert point.schedule is not None
        level = point.levels[0]
        noise = point.memory.setdefault("noise", x)
        begins = "begun" not in point.memory
        if begins or level > self.k_min:
            clean = latents_of(self.picture, point, self.name).expand_as(x)
            layout = point.schedule.add_noise(clean, noise, point.t).to(x)
            x = layout if begins else x + s * (layout - x)
        if level <= self.k_max:
            point.memory["begun"] = True
        return x

    def overwrites(self, start: float) -> bool:
        # Down to the first level that is not above k_max, where the prompt begins.
        return start > self.k_max

    def check(self, network: Network) -> None:
        check_picture(self.picture, self.name)


def build(config: Config) -> Config:
    """The term."""
    return config
