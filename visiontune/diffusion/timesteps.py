"""Which timesteps a model is trained at: a density, moved by a shift, cut to a range.

With s = t / num_train_timesteps in [0, 1], 1 being pure noise, a density is given by its quantile function Q, so that
a uniform number u gives Q(u); the shift moves that to k s / (1 + (k - 1) s) (Esser et al., 2024, arXiv 2403.03206,
equation 23), and the range keeps the part of the density between `low` and `high`, renormalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visiontune.diffusion.schedule import Schedule
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Timesteps:
    """The option `timesteps` of objectives that noise clean latents; a bare value is the density."""

    SHORTHAND: ClassVar[str] = "density"

    density: Literal["uniform", "logit_normal"] = option(
        "uniform", help="uniform, or the logistic function of a normal number, which is dense in the middle"
    )
    mean: float = option(
        0.0, least=-100, greatest=100, help="mean of logit_normal's normal number; above 0 is towards the noise"
    )
    std: float = option(1.0, above=0, greatest=100, help="its standard deviation")
    shift: float = option(
        1.0, above=0, greatest=1000, help="moves timesteps towards the noise (above 1) or away from it"
    )
    low: float = option(0.0, least=0, below=1, help="least noise trained at, as a share of the schedule in [0, 1]")
    high: float = option(1.0, above=0, greatest=1, help="most noise trained at, as a share of the schedule in [0, 1]")

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, but they are {self.low:g} and {self.high:g}")

    def draw(
        self,
        schedule: Schedule,
        rows: int,
        rng: torch.Generator,
        quantile: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> Tensor:
        """Timesteps [rows] on the CPU: int64 0 .. num_train_timesteps - 1, or float32 in [0, num] for flow.

        Args:
            schedule: of the model.
            quantile: [rows] in [0, 1), where in the density they are to lie; drawn from `rng` unless given.
            bounds: [rows, 2] low and high of each row, inside of those of the option.
        """
        u = torch.rand(rows, generator=rng, dtype=torch.float64) if quantile is None else quantile.cpu().double()
        low, high = (torch.full((rows,), value, dtype=torch.float64) for value in (self.low, self.high))
        if bounds is not None:
            low, high = low.maximum(bounds[:, 0].cpu().double()), high.minimum(bounds[:, 1].cpu().double())
        least, most = self.cdf(low), self.cdf(high)
        share = self.quantile(least + u * (most - least)).clamp(low, high)
        total = schedule.num_train_timesteps
        if schedule.prediction == "flow":
            return (share * total).float()
        return (share * total).long().clamp(max=total - 1)

    def quantile(self, u: Tensor) -> Tensor:
        """Q(u), shifted; float64 in [0, 1]."""
        share = u if self.density == "uniform" else torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        return self.shift * share / (1 + (self.shift - 1) * share)

    def cdf(self, share: Tensor) -> Tensor:
        """The inverse of `quantile`."""
        unshifted = share / (self.shift - (self.shift - 1) * share)
        if self.density == "uniform":
            return unshifted
        return torch.special.ndtr((torch.logit(unshifted) - self.mean) / self.std)
