"""Plain denoising: predict the noise (or the velocity, or the image) that was mixed into a clean latent.

Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv 2006.11239, equation 14, with two options:
min-SNR weighting (Hang et al., 2023, arXiv 2303.09556, section 3.4) and offset noise (Guttenberg, 2023, "Diffusion with
Offset Noise").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.errors import UserError
from visiontune.objectives.base import Objective, combine, condition_of
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.diffusion.schedule import Schedule
    from visiontune.models.base import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the denoising loss."""

    snr_gamma: float | None = option(
        None, help="min-SNR weighting with this gamma (5 is usual); null weighs every t alike"
    )
    offset_noise: float = option(
        0.0, help="standard deviation of a per-channel offset added to the noise (0.1 is usual)"
    )
    min_timestep: int = option(0, help="first training timestep, 0 is the cleanest")
    max_timestep: int | None = option(None, help="one past the last training timestep; null is the whole schedule")

    def __post_init__(self) -> None:
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError("snr_gamma must be above 0, or null for no weighting")
        if self.offset_noise < 0:
            raise ValueError("offset_noise must be 0 or more")
        if self.min_timestep < 0 or (self.max_timestep is not None and self.max_timestep <= self.min_timestep):
            raise ValueError("timesteps need 0 <= min_timestep < max_timestep")


def build(config: Config) -> Denoising:
    """The objective that ``config`` describes."""
    return Denoising(config)


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Weight of each row's mean squared error so that its error in x_0 counts ``min(SNR, gamma)``.

    Args:
        snr: ``[b]``, alpha^2 / sigma^2, 0 allowed.
        gamma: where the weight of clean timesteps is cut.
        prediction: what the network predicts; the error in ``eps`` is SNR times the one in ``x0``, the error in ``v``
            SNR + 1 times.

    Raises:
        UserError: a prediction without a signal-to-noise ratio of this kind (flow models).
    """
    clipped = snr.clamp(max=gamma)
    if prediction == "eps":
        return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, finite at SNR = 0
    if prediction == "v":
        return clipped / (snr + 1)
    if prediction == "x0":
        return clipped
    raise UserError(f"objective.snr_gamma does not apply to a model that predicts '{prediction}'; set it to null")


class Denoising(Objective):
    """``mean over rows of weight * w(t) * mean over c,h,w of (predict(x_t, t, cond) - target)^2``."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def loss(self, model: DiffusionModel, batch: Batch, rng: torch.Generator) -> Loss:
        return Loss(total=combine(self.errors(model, batch, rng), batch), terms={})

    def errors(self, model: DiffusionModel, batch: Batch, rng: torch.Generator) -> Tensor:
        """Error of each row ``[b]`` in float32, min-SNR weighted, before the row weights."""
        x_0 = batch.data["image"].float()
        t = self.timesteps(model.schedule, len(x_0), rng, batch.data.get("quantile")).to(x_0.device)
        eps = self.noise(x_0, rng)
        return self.errors_at(model, x_0, eps, t, condition_of(model, batch))

    def errors_at(self, model: DiffusionModel, x_0: Tensor, eps: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Error of each row ``[b]``, at least float32, at the given noise and timesteps ``[b]``."""
        pred = model.predict(model.schedule.add_noise(x_0, eps, t), t, cond)
        pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
        error = (pred - model.schedule.target(x_0, eps, t)).square().flatten(1).mean(1)
        if self.config.snr_gamma is None:
            return error
        return error * min_snr_weight(model.schedule.snr(t), self.config.snr_gamma, model.schedule.prediction)

    def timesteps(self, schedule: Schedule, rows: int, rng: torch.Generator, quantile: Tensor | None = None) -> Tensor:
        """Uniform timesteps, int64 ``[rows]`` on the CPU, in ``[min_timestep, max_timestep)``.

        Args:
            quantile: ``[rows]`` in [0, 1), where in that range they are to lie; drawn from ``rng`` unless given.
        """
        total, start, end = schedule.num_train_timesteps, self.config.min_timestep, self.config.max_timestep
        if max(end or 0, start + 1) > total:
            raise UserError(f"objective.max_timestep and min_timestep must fit the model's {total} timesteps")
        if quantile is not None:
            return (start + quantile.cpu().double() * ((end or total) - start)).long()
        return torch.randint(start, end or total, (rows,), generator=rng)

    def noise(self, x_0: Tensor, rng: torch.Generator) -> Tensor:
        """eps of the shape and device of ``x_0``: standard normal, plus the offset shared by a channel's pixels.

        The target is made of this same eps, so with ``offset_noise = o`` a channel's mean has variance
        ``o^2 + 1 / (h w)``.
        """
        eps = torch.randn(x_0.shape, generator=rng)
        if self.config.offset_noise:
            shape = (*x_0.shape[:2], *[1] * (x_0.ndim - 2))
            eps = eps + self.config.offset_noise * torch.randn(shape, generator=rng)
        return eps.to(x_0.device)
