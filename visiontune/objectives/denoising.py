"""Plain denoising: predict the noise (or the velocity, or the image) that was mixed into a clean latent.

Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv 2006.11239, equation 14, with weights of timesteps
(min-SNR: Hang et al., 2023, arXiv 2303.09556, section 3.4; those of flow: Esser et al., 2024, arXiv 2403.03206, section
3.1) and offset noise (Guttenberg, 2023, "Diffusion with Offset Noise").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion import levels
from visiontune.diffusion.timesteps import Timesteps
from visiontune.errors import UserError
from visiontune.objectives._reference import Reference
from visiontune.objectives.base import Needs, Supervised, Tools, by_range, combine, condition_of, continuous, per_row
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Noising:
    """Options of whatever is trained on noisy latents of clean ones."""

    RENAMED: ClassVar[dict[str, str]] = {
        "min_timestep": "timesteps.low, a share of the schedule (0.2 for timestep 200 of 1000)",
        "max_timestep": "timesteps.high, a share of the schedule (0.2 for timestep 200 of 1000)",
    }

    snr_gamma: float | None = option(
        None, above=0, greatest=1e6, help="min-SNR weighting with this gamma (5 is usual); null weighs every t alike"
    )
    weighting_scheme: Literal["none", "sigma_sqrt", "cosmap"] = option(
        "none", help="of flow models, how much each noise level counts: alike, sigma^-2, or as densely as a cosine map"
    )
    offset_noise: float = option(
        0.0, least=0, greatest=100, help="standard deviation of a per-channel offset added to the noise (0.1 is usual)"
    )
    timesteps: Timesteps = option(
        Timesteps(), help="the noise that is trained at: density, with its numbers (mean, std, ...), shift, low, high"
    )
    distilled: bool = option(False, help="train a model that was distilled to few steps all the same, and so undo that")

    def __post_init__(self) -> None:
        if self.snr_gamma is not None and self.weighting_scheme != "none":
            raise ValueError(
                f"snr_gamma and weighting_scheme={self.weighting_scheme} both weigh timesteps: take snr_gamma=null, or "
                "weighting_scheme=none"
            )


@dataclass(frozen=True, kw_only=True)
class Config(Noising):
    """Options of the denoising loss."""

    reference_weight: float = option(
        0.0,
        least=0,
        greatest=1e6,
        help="of the squared distance to what the untrained model predicts of the same noisy latents; 1 in DeMe",
    )


def build(config: Config) -> Denoising:
    """The objective that ``config`` describes."""
    return Denoising(config)


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Weight of each row's mean squared error so that its error in x_0 counts ``min(SNR, gamma)``.

    Args:
        snr: ``[b]``, alpha^2 / sigma^2, 0 allowed.
        gamma: where the weight of clean timesteps is cut.
        prediction: what the network predicts; the error in ``eps`` is SNR times the one in ``x0``, the error in ``v``
            SNR + 1 times, and that of a flow, whose sigma is 1 / (1 + sqrt(SNR)), sigma^-2 times.
    """
    clipped = snr.clamp(max=gamma)
    if prediction == "eps":
        return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, finite at SNR = 0
    if prediction == "v":
        return clipped / (snr + 1)
    return clipped if prediction == "x0" else clipped / (1 + snr.sqrt()).square()


def flow_weight(sigma: Tensor, scheme: str, least: float) -> Tensor:
    """Weight of each row's mean squared error of a velocity, by the names that diffusers and kohya have for them.

    Args:
        sigma: ``[b]`` in [0, 1].
        scheme: ``sigma_sqrt`` is sigma^-2; ``cosmap`` is the density of a flow that runs through the noise levels of a
            cosine schedule, 2 / (pi (1 - 2 sigma + 2 sigma^2)), mean 1 over uniform timesteps.
        least: the sigma below which ``sigma_sqrt`` grows no more.
    """
    if scheme == "sigma_sqrt":
        return sigma.clamp(min=least) ** -2
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))


class Denoising(Supervised):
    """``mean over rows of weight * w(t) * mean over c, h, w of mask * (predict(x_t, t, cond) - target)^2``."""

    config: Noising

    def __init__(self, config: Noising) -> None:
        self.config = config
        self._reference = Reference()

    @property
    def needs(self) -> Needs:
        held = self.reference_weight > 0
        optional = ("mask", "region", "source")
        return Needs(columns=("image",), optional=optional, reference=held, ranges=True, scores=True)

    @property
    def reference_weight(self) -> float:
        """How much the distance to the untrained model counts."""
        return self.config.reference_weight if isinstance(self.config, Config) else 0.0

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse what has no continuous latents, weights of another kind, and a distillation to be undone."""
        super().check(model, reward)
        continuous(model)
        scheme, predicted = self.config.weighting_scheme, model.schedule.prediction
        if scheme != "none" and predicted != "flow":
            raise UserError(
                f"objective.weighting_scheme={scheme} weighs errors of flow, and '{model.source}' predicts "
                f"{predicted}: leave it out, or take objective.snr_gamma=5"
            )
        if model.distilled and not self.config.distilled:
            raise UserError(
                f"model '{model.source}' ({model.family}) was distilled to few steps ({model.distilled}), which a "
                "denoising loss undoes: train the model that it came from, put an assistant under the adapter "
                "(adapter.under=FILE), or set objective.distilled=true"
            )

    def loss(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Loss:
        errors = self.errors(model, batch, tools)
        return Loss(total=combine(errors, batch), terms=by_range(errors, batch))

    def errors(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Tensor:
        """Error of each row ``[b]`` in float32, weighted by timestep and masked, before the row weights.

        With ``reference_weight``, ``|f(x_t, t) - target|^2 + reference_weight |f(x_t, t) - f_0(x_t, t)|^2`` of the
        untrained f_0 (Ma et al., "Decouple-Then-Merge", 2024, arXiv 2410.06664), the second without the mask.
        """
        x_0 = batch.data["image"].float()
        t, eps = self.noised(model, x_0, batch, tools)
        x_t, target = model.schedule.add_noise(x_0, eps, t), model.schedule.target(x_0, eps, t)
        target = self.targets(model, x_t, t, target, batch, tools)
        # First: of a model whose weights are all trained, the reference changes them in place for its call.
        base = self._reference.predict(model, x_t, t, batch, tools) if self.reference_weight else None
        pred = model.predict(x_t, t, condition_of(model, batch))
        errors = per_row(self.squared(model, pred, target, t), batch.data.get("mask"))
        return errors if base is None else errors + self.reference_weight * per_row(self.squared(model, pred, base, t))

    def targets(
        self, model: DiffusionModel, x_t: Tensor, t: Tensor, target: Tensor, batch: Batch, tools: Tools
    ) -> Tensor:
        """What each row is to predict, like ``x_t``: ``target``, what was mixed in."""
        return target

    def noised(self, model: DiffusionModel, x_0: Tensor, batch: Batch, tools: Tools) -> tuple[Tensor, Tensor]:
        """Timesteps ``[b]`` and noise like ``x_0`` for the rows of a batch."""
        quantile, bounds = batch.data.get("quantile"), batch.timestep_range
        bounds = None if bounds is None else levels.shares(bounds, model.schedule)
        t = self.config.timesteps.draw(model, x_0.shape[1:], len(x_0), tools.rng, quantile, bounds)
        return t.to(x_0.device), self.noise(x_0, tools.rng)

    def error_map(self, model: DiffusionModel, x_t: Tensor, t: Tensor, cond: Condition, target: Tensor) -> Tensor:
        """Squared error of every value, like ``x_t``, weighted, at the given timesteps ``[b]``."""
        return self.squared(model, model.predict(x_t, t, cond), target, t)

    def squared(self, model: DiffusionModel, pred: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Squared error of every value of a prediction, at least in float32, weighted, at its timesteps ``[b]``."""
        error = (pred.to(torch.promote_types(pred.dtype, torch.float32)) - target).square()
        weight = self.weight(model, t)
        return error if weight is None else error * weight.view(-1, *(1,) * (error.ndim - 1))

    def weight(self, model: DiffusionModel, t: Tensor) -> Tensor | None:
        """How much the errors at timesteps ``[b]`` count, ``[b]``; ``None`` where all count alike."""
        schedule = model.schedule
        if self.config.snr_gamma is not None:
            return min_snr_weight(schedule.snr(t), self.config.snr_gamma, schedule.prediction)
        if self.config.weighting_scheme != "none":
            # One step of the table that such weights were made for.
            return flow_weight(schedule.sigma(t), self.config.weighting_scheme, 1 / schedule.num_train_timesteps)
        return None

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
