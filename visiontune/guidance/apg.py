"""APG: CFG of the clean picture, whose step is bounded, has momentum and goes across the prompt's prediction.

Sadat et al., 2024, arXiv 2410.02416, algorithm 1, in predictions of x_0: D = c - u; m = D + b m; D = m min(1, r / |m|);
p = c + (w - 1) (D_across + eta D_along), where D_along is the part of D along c.
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
    """Adaptive projected guidance; eta 1 without momentum and threshold is CFG."""

    scale: float = option(least=-1000, greatest=1000, help="w; 1 is none and costs nothing")
    eta: float = option(0.0, least=-10, greatest=10, help="how much of the step along the prompt's prediction is kept")
    momentum: float = option(-0.5, above=-1, below=1, help="b, of earlier steps; 0 makes every step stand alone")
    threshold: float | None = option(
        15.0, above=0, greatest=1e9, help="r, the longest step in the norm of the latents; null for any"
    )

    @property
    def remembers(self) -> bool:
        return self.momentum != 0 and not self.idle

    def combine(self, u: Tensor, c: Tensor, w: Strength, point: Point) -> Tensor:
        assert point.schedule is not None
        clean = point.schedule.to_x_0(c, point.x, point.t)
        slope = point.schedule.per_x_0(point.t, c.ndim).to(clean)
        step = (c.to(clean) - u.to(clean)) / slope
        if self.remembers:
            before = point.memory.get("step")
            step = step if before is None else step + self.momentum * before
            point.memory["step"] = step.detach()
        if self.threshold is not None:
            # A row whose step is 0 keeps it.
            length = dot(step, step).sqrt().clamp(min=torch.finfo(step.dtype).tiny)
            step = step * (self.threshold / length).clamp(max=1)
        along = dot(step, clean) / dot(clean, clean).clamp(min=torch.finfo(step.dtype).tiny) * clean
        return (c + (w - 1) * slope * (step - along + self.eta * along)).to(c.dtype)

    def check(self, network: Network) -> None:
        if network.schedule is None:
            raise UserError(f"apg works on the clean picture, and '{network.source}' predicts tokens: take cfg")


def build(config: Config) -> Config:
    """The term."""
    return config
