"""Inpaint: the masked part of a picture drawn anew, by any model, the rest kept.

Blended latent diffusion (Avrahami et al., 2023, arXiv 2206.02779): where a step starts, latents outside of the mask are
the picture's own, noised to that level with the noise n that the run started from: m x + (1 - m) (alpha x_0 + sigma n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from visiontune.guidance._network import Network
from visiontune.guidance._pictures import check_mask, check_picture, latents_of, mask_of
from visiontune.guidance.base import Edit, Point, Strength
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Edit):
    """What is outside of a mask, from a picture."""

    scale: float = option(1.0, least=0, greatest=1, help="how much of the rest is the picture's; 0 is a free drawing")
    picture: Any = option(help="file of the picture, in the ratio of what is drawn")
    mask: Any = option(
        help="file of the mask, white where the picture is drawn anew; or left, top, width and height in pixels"
    )

    def edit(self, x: Tensor, s: Strength, point: Point) -> Tensor:
        assert point.schedule is not None
        noise = point.memory.setdefault("noise", x)
        clean = latents_of(self.picture, point, self.name).expand_as(x)
        known = point.schedule.add_noise(clean, noise, point.t).to(x)
        outside = s * (1 - mask_of(self.mask, point, self.name))
        # What is kept is the picture's to the bit, and what is drawn anew is the model's.
        return x.where(outside == 0, known.where(outside == 1, x + outside * (known - x)))

    def check(self, network: Network) -> None:
        check_picture(self.picture, self.name)
        check_mask(self.mask, self.name)


def build(config: Config) -> Config:
    """The term."""
    return config
