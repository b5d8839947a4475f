"""CFG-Zero*: CFG whose negative side is scaled to fit the prompt's, and no flow in the first step.

Fan et al., 2025, arXiv 2503.18886: a = <c, u> / |u|^2 of each row, then a u + w (c - a u). It was made for flow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.guidance.base import Base, Point, Strength, dot
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Base):
    """The scaled negative side, and the level from which the flow counts as none."""

    scale: float = option(least=-1000, greatest=1000, help="w of a u + w (c - a u); 1 is none and costs nothing")
    zero: float | None = option(
        1.0,
        above=0,
        greatest=1,
        help="level of noise from which the flow is taken as zero; 1 is the first step of most samplers, null never",
    )

    def combine(self, u: Tensor, c: Tensor, w: Strength, point: Point) -> Tensor:
        wide_u, wide_c = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in (u, c))
        near = (dot(wide_c, wide_u) / dot(wide_u, wide_u).clamp(min=torch.finfo(wide_u.dtype).tiny)).to(u.dtype) * u
        guided = near + w * (c - near)
        still = [self._still(level) for level in point.levels]
        if not any(still):
            return guided
        moves = guided.new_tensor([not stops for stops in still]).view(-1, *(1,) * (guided.ndim - 1))
        return guided * moves

    def _still(self, level: float) -> bool:
        return self.zero is not None and level >= self.zero and self.at(level) != self.NEUTRAL

    def check(self, network: Network) -> None:
        prediction = network.schedule.prediction if network.schedule else "tokens"
        if self.zero is not None and prediction != "flow":
            raise UserError(
                f"cfg_zero takes the first steps' flow as zero, and '{network.source}' predicts {prediction}: set its "
                "zero to null"
            )


def build(config: Config) -> Config:
    """The term."""
    return config
