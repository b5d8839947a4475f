"""Which timesteps a model is trained at: a density, moved by a shift, cut to a range.

With s = t / num_train_timesteps in [0, 1], 1 being pure noise, a density is given by its quantile function Q, so that
a uniform number u gives Q(u); the shift moves that to k s / (1 + (k - 1) s) (Esser et al., 2024, arXiv 2403.03206,
equation 23), and the range keeps the part of the density between `low` and `high`, renormalised.

Logit-normal, mode and cosmap are those of section 3.1 of that paper. The inverted parabola is that of Chroma's training
code, p(s) ~ 2 - 7.7 (s - 1/2)^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from scipy import special
from torch import Tensor

from visiontune.diffusion.schedule import shifted
from visiontune.errors import UserError
from visiontune.schema import option

_BEND = 7.7  # of the inverted parabola
_AREA = 2 - _BEND / 12  # below it
_HALVINGS = 60  # of [0, 1], beyond which float64 tells nothing apart
_ROUNDING = 1e-6  # of a bound in timesteps, which is mostly meant to be whole
_TENTHS, _BAR = 10, 40  # of the plot


@dataclass(frozen=True, kw_only=True)
class Timesteps:
    """The option `timesteps` of objectives that noise clean latents; a bare value is the density."""

    SHORTHAND: ClassVar[str] = "density"

    density: Literal["uniform", "logit_normal", "mode", "cosmap", "beta", "inverted_parabola"] = option(
        "uniform", help="how dense timesteps are before the shift; all but uniform by default most so in the middle"
    )
    mean: float = option(
        0.0, least=-100, greatest=100, help="mean of logit_normal's normal number; above 0 is towards the noise"
    )
    std: float = option(1.0, above=0, greatest=100, help="its standard deviation")
    scale: float = option(
        1.29, least=-1, greatest=1.75, help="of mode: above 0 is dense in the middle, below 0 at both ends"
    )
    alpha: float = option(2.0, least=0.01, greatest=1000, help="of beta, s^(alpha - 1) (1 - s)^(beta - 1)")
    beta: float = option(2.0, least=0.01, greatest=1000, help="of beta; with alpha=2 a parabola that is 0 at both ends")
    shift: float | Literal["model"] = option(
        1.0,
        least=0.001,
        greatest=1000,
        help="moves timesteps towards the noise (above 1) or away from it; model: as the model's own sampler does, "
        "by resolution too",
    )
    low: float = option(0.0, least=0, below=1, help="least noise trained at, as a share of the schedule in [0, 1]")
    high: float = option(1.0, above=0, greatest=1, help="most noise trained at, as a share of the schedule in [0, 1]")
    global_share: float = option(
        0.0,
        least=0,
        greatest=1,
        help="share of rows in [0, 1] that are drawn from the whole schedule, whatever low, high and "
        "data.timestep_range say",
    )

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, but they are {self.low:g} and {self.high:g}")

    def draw(
        self,
        model: Any,
        shape: Sequence[int],
        rows: int,
        rng: torch.Generator,
        quantile: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> Tensor:
        """Timesteps [rows] on the CPU: int64 0 .. num_train_timesteps - 1, or float32 in [0, num] for flow.

        Args:
            model: has the schedule, and the shift where it is to be the model's own.
            shape: [c, (f), h, w] of the latents, by which some models shift.
            quantile: [rows] in [0, 1), where in the density they are to lie; drawn from `rng` unless given.
            bounds: [rows, 2] low and high of each row, inside of those of the option. A timestep of a table belongs
                to the range that it begins in.

        Raises:
            UserError: nothing of the density lies in the range.
        """
        u = torch.rand(rows, generator=rng, dtype=torch.float64) if quantile is None else quantile.cpu().double()
        k = model.sampling_shift(shape) if self.shift == "model" else self.shift
        low, high = (torch.full((rows,), value, dtype=torch.float64) for value in (self.low, self.high))
        if bounds is not None:
            low, high = low.maximum(bounds[:, 0].cpu().double()), high.minimum(bounds[:, 1].cpu().double())
        if self.global_share:
            everywhere = torch.rand(rows, generator=rng) < self.global_share
            low, high = low.masked_fill(everywhere, 0), high.masked_fill(everywhere, 1)
        least, most = self.cdf(shifted(low, 1 / k)), self.cdf(shifted(high, 1 / k))
        if not (least < most).all():
            row = int((least < most).int().argmin())
            raise UserError(
                f"timesteps: nothing of density={self.density} lies between low={low[row]:g} and high={high[row]:g}: "
                "widen them, or take another density or shift"
            )
        share = shifted(self.quantile(least + u * (most - least)), k).clamp(low, high)
        total = model.schedule.num_train_timesteps
        if model.schedule.prediction == "flow":
            return (share * total).float()
        end = (high * total - _ROUNDING).ceil().long()
        return (share * total).long().minimum(end - 1)

    def quantile(self, u: Tensor) -> Tensor:
        """Q(u) before the shift, float64 in [0, 1] -> [0, 1]."""
        match self.density:
            case "logit_normal":
                return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
            case "mode":  # equation 20, read from the other end, so that it rises
                return u + self.scale * (u - torch.sin(math.pi / 2 * u).square())
            case "cosmap":
                sin, cos = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
                return sin / (sin + cos)
            case "beta":
                return torch.as_tensor(special.betaincinv(self.alpha, self.beta, u.numpy()))
            case "inverted_parabola":  # the middle one of the three roots of its cubic `cdf`
                root = math.sqrt(2 / _BEND)
                angle = torch.asin(3 * _AREA * (u - 0.5) / (4 * root)) / 3
                return 0.5 + 2 * root * torch.sin(angle)
            case _:
                return u

    def cdf(self, share: Tensor) -> Tensor:
        """The inverse of `quantile`."""
        match self.density:
            case "logit_normal":
                return torch.special.ndtr((torch.logit(share) - self.mean) / self.std)
            case "mode":
                return _inverse(self.quantile, share)
            case "cosmap":
                return torch.atan2(share, 1 - share) * (2 / math.pi)
            case "beta":
                return torch.as_tensor(special.betainc(self.alpha, self.beta, share.numpy()))
            case "inverted_parabola":
                x = share - 0.5
                return 0.5 + (2 * x - _BEND / 3 * x**3) / _AREA
            case _:
                return share


def spread(count: int, rng: torch.Generator) -> Tensor:
    """Quantiles [count] in [0, 1), one in each part of equal length, in order."""
    return (torch.arange(count) + torch.rand(count, generator=rng)) / count


def _inverse(rising: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Where in [0, 1] a function that rises there takes some values, by bisection."""
    low, high = torch.zeros_like(values), torch.ones_like(values)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = rising(middle) < values
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """What timesteps were drawn, as shares of the schedule.

    Attributes:
        count: how many. mean: of them. tenths: [10], the share of them that lies in each tenth.
    """

    count: int
    mean: float
    tenths: tuple[float, ...]

    @classmethod
    def of(cls, shares: Tensor) -> Histogram:
        """Of shares [n] in [0, 1]."""
        places = (shares.double() * _TENTHS).long().clamp(max=_TENTHS - 1)
        counts = places.bincount(minlength=_TENTHS) / len(shares)
        return cls(count=len(shares), mean=float(shares.double().mean()), tenths=tuple(counts.tolist()))

    def lines(self) -> list[str]:
        """One line for each tenth, with a bar as long as its share."""
        longest = max(self.tenths)
        return [
            f"  {i / _TENTHS:.1f}-{(i + 1) / _TENTHS:.1f} {share:6.1%} {'#' * round(_BAR * share / longest)}".rstrip()
            for i, share in enumerate(self.tenths)
        ]
