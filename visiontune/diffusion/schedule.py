"""Noise schedules and what a network predicts under them.

Every family noises along x_t = alpha x_0 + sigma eps. The prediction is one of
eps; v = alpha eps - sigma x_0 (Salimans and Ho, 2022, appendix D); x0; or flow = eps - x_0 (Lipman et al., 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from visiontune.diffusion._schedulers import (
    Prediction,
    ddim_scheduler,
    flow_shift,
    flow_sigmas,
    flow_spacing,
    prediction_of,
)
from visiontune.errors import UserError

__all__ = ["Prediction", "Schedule", "calculate_mu", "ddim_scheduler", "evenly", "shifted"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """alpha and sigma of every timestep.

    A timestep is an integer 0 .. num_train_timesteps - 1 (flow: .. num_train_timesteps, the pure noise, and any
    fraction between them); any negative one stands for the end of the chain, which a sampler steps to last. Per-row
    results are [b]; methods that take tensors [b, ...] return at least float32, and float64 for float64 input.

    Attributes:
        prediction: what the network predicts.
        alphas, sigmas: float64 tables; the last entry is the end of the chain.
        num_train_timesteps: number of timesteps of training.
        spacing: the scheduler that places sampling timesteps, and shifts its own; None places them evenly.
        shift: moves evenly placed ones towards the noise (`shifted`).
    """

    prediction: Prediction
    alphas: Tensor = field(repr=False)
    sigmas: Tensor = field(repr=False)
    num_train_timesteps: int
    spacing: Any = field(default=None, repr=False)
    shift: float = 1.0
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"prediction '{self.prediction}' is not one of {get_args(Prediction)}")

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Schedule:
        """The schedule that a diffusers scheduler was configured with, whichever sampler it is.

        The levels are the scheduler's own `alphas_cumprod`, so that a rescaled or shifted signal-to-noise ratio is in
        them. Only schedulers that were compared with a `Schedule` are taken (`_schedulers.py` lists them).

        Raises:
            UserError: another class of scheduler, an unknown prediction type, or a setting that changes levels or
                sampling sigmas in a way that is not followed.
        """
        prediction = prediction_of(scheduler)
        if prediction == "flow":
            return replace(cls.flow(scheduler.config.num_train_timesteps), spacing=flow_spacing(scheduler))
        ddim = ddim_scheduler(scheduler)
        squared = torch.cat([ddim.alphas_cumprod, ddim.final_alpha_cumprod.reshape(1)]).double()
        return cls(
            prediction=prediction,
            alphas=squared.sqrt(),
            sigmas=(1 - squared).sqrt(),
            num_train_timesteps=len(ddim.alphas_cumprod),
            spacing=ddim,
        )

    @classmethod
    def flow(cls, num_train_timesteps: int = 1000, shift: float = 1.0) -> Schedule:
        """Rectified flow: alpha = 1 - sigma, sigma = t / num_train_timesteps."""
        sigmas = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        return cls(
            prediction="flow", alphas=1 - sigmas, sigmas=sigmas, num_train_timesteps=num_train_timesteps, shift=shift
        )

    def timesteps(
        self, steps: int, *, mu: float | None = None, sigmas: Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Where a sampler of `steps` steps stands and steps to: t and t_next, both [steps], on the CPU.

        They are int64; float32 for flow, where they need not be whole: what the scheduler's own `set_timesteps` makes
        of the same arguments, times `num_train_timesteps`.

        Args:
            mu: the shift by resolution (`calculate_mu`), for schedulers with `use_dynamic_shifting`.
            sigmas: [steps], a flow family's own sampling sigmas, falling from 1, which are still to be shifted; None
                takes the scheduler's.

        Raises:
            UserError: steps is out of range, mu is missing, or the sigmas do not fall from 1 to 0.
            ValueError: sigmas for a model that is not flow, or of another length.
        """
        if not 1 <= steps <= self.num_train_timesteps:
            raise UserError(f"steps={steps} is out of range: give 1 to {self.num_train_timesteps}")
        if sigmas is not None and (self.prediction != "flow" or len(sigmas) != steps):
            raise ValueError(f"sigmas are for flow, one a step: {len(sigmas)} of {self.prediction} with steps={steps}")
        if self.prediction == "flow":
            t = self._flow_timesteps(steps, mu, sigmas)
            return t[:-1], t[1:]
        if self.spacing is None:
            t = torch.linspace(self.num_train_timesteps, 0, steps + 1).round().long()
            return t[:-1], t[1:]
        self.spacing.set_timesteps(steps)
        t = self.spacing.timesteps
        # DDIM steps back by a constant stride, also where the spacing rounds its timesteps unevenly.
        return t, t - self.num_train_timesteps // steps

    def sampling_shift(self, mu: float | None = None) -> float:
        """k of the shift (`shifted`) by which the model's sampler moves its steps; 1 where it moves none.

        Args:
            mu: the shift by resolution, for schedulers with `use_dynamic_shifting`; others take no notice.

        Raises:
            UserError: mu is missing.
        """
        if self.prediction != "flow":
            return 1.0
        return self.shift if self.spacing is None else flow_shift(self.spacing, mu)

    def ddim(self) -> Any:
        """A fresh DDIM scheduler for the stock pipeline, with the steps of `timesteps`.

        Raises:
            ValueError: the schedule is not one that DDIMScheduler can express (flow).
        """
        if self.spacing is None or self.prediction == "flow":
            raise ValueError("a flow schedule has no DDIM scheduler")
        return ddim_scheduler(self.spacing)

    def alpha(self, t: Tensor) -> Tensor:
        """Signal level, [b] -> [b] float32."""
        return self._levels(t)[0].float()

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level, [b] -> [b] float32."""
        return self._levels(t)[1].float()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, [b] -> [b] float32."""
        alpha, sigma = self._levels(t)
        return (alpha / sigma).square().float()

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma eps."""
        alpha, sigma = self._like(x_0, t)
        return alpha * x_0 + sigma * eps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should predict at x_t."""
        alpha, sigma = self._like(x_0, t)
        match self.prediction:
            case "eps":
                return eps.to(alpha.dtype)
            case "x0":
                return x_0.to(alpha.dtype)
            case "v":
                return alpha * eps - sigma * x_0
            case "flow":
                return eps.to(alpha.dtype) - x_0

    def to_x_0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a prediction at x_t implies; infinite for eps where alpha is 0."""
        alpha, sigma = self._like(x_t, t)
        match self.prediction:
            case "eps":
                return (x_t - sigma * pred) / alpha
            case "x0":
                return pred.to(alpha.dtype)
            case "v":
                return alpha * x_t - sigma * pred
            case "flow":
                return x_t - sigma * pred

    def to_eps(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction at x_t implies; infinite for x0 where sigma is 0."""
        alpha, sigma = self._like(x_t, t)
        match self.prediction:
            case "eps":
                return pred.to(alpha.dtype)
            case "x0":
                return (x_t - alpha * pred) / sigma
            case "v":
                return alpha * pred + sigma * x_t
            case "flow":
                return x_t + alpha * pred

    def per_x_0(self, t: Tensor, ndim: int) -> Tensor:
        """By how much the prediction at an x_t changes with the clean latents that it implies, float64 [b, 1, ...]; for
        all but x0 infinite where sigma is 0."""
        alpha, sigma = self.levels(t, ndim)
        match self.prediction:
            case "eps":
                return -alpha / sigma
            case "x0":
                return torch.ones_like(sigma)
            case "v" | "flow":
                return -1 / sigma

    def weights(self, t: Tensor, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """What `signal x_0 + noise eps` is in x_t and the prediction: the weight of each, float64.

        Args:
            t: [b]. signal, noise: [b] float64.
        """
        alpha, sigma = self.levels(t, 1)
        # A step that goes nowhere must come out with exactly no weight of the prediction.
        match self.prediction:
            case "eps":
                return signal / alpha, noise - signal / alpha * sigma
            case "x0":
                return noise / sigma, signal - noise / sigma * alpha
            case "v":
                return signal * alpha + noise * sigma, noise * alpha - signal * sigma
            case "flow":
                return signal + noise, noise * alpha - signal * sigma

    def levels(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """alpha and sigma in float64, shaped [b, 1, ...] to multiply a tensor of `ndim` axes."""
        alpha, sigma = self._levels(t)
        shape = (-1,) + (1,) * (ndim - 1)
        return alpha.view(shape), sigma.view(shape)

    def _like(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        alpha, sigma = self.levels(t, x.ndim)
        return alpha.to(x.device, dtype), sigma.to(x.device, dtype)

    def _flow_timesteps(self, steps: int, mu: float | None, sigmas: Sequence[float] | None) -> Tensor:
        """[steps + 1] float32, the last one clean."""
        if self.spacing is not None:
            return flow_sigmas(self.spacing, steps, mu, sigmas) * self.num_train_timesteps
        sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        if sigmas is not None:
            sigma[:-1] = torch.as_tensor(sigmas, dtype=torch.float64)
        return (shifted(sigma, self.shift) * self.num_train_timesteps).float()

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.prediction == "flow" and t.is_floating_point():
            exact = t.to(torch.float32 if t.device.type == "mps" else torch.float64)
            sigma = exact.clamp(min=0) / self.num_train_timesteps
            return 1 - sigma, sigma
        if t.device not in self._on_device:
            dtype = torch.float32 if t.device.type == "mps" else torch.float64  # MPS has no float64
            self._on_device[t.device] = (self.alphas.to(t.device, dtype), self.sigmas.to(t.device, dtype))
        alphas, sigmas = self._on_device[t.device]
        row = t.long().clamp(min=-1)  # -1 reads the last entry, the end of the chain
        return alphas[row], sigmas[row]


def shifted(sigma: Tensor, k: float) -> Tensor:
    """Noise levels in [0, 1] moved towards the noise, k sigma / (1 + (k - 1) sigma); 1 / k moves them back.

    Esser et al., 2024, arXiv 2403.03206, equation 23.
    """
    moved = k * sigma
    return moved / (moved + (1 - sigma))  # 0 and 1 stay what they are, to the bit


def calculate_mu(tokens: int, config: Mapping[str, Any]) -> float:
    """The shift by resolution: linear in the number of image tokens, from base_shift to max_shift.

    Args:
        tokens: image tokens that the network sees.
        config: a scheduler's; what it lacks is the default of the stock pipelines (FLUX.1's).
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    start, end = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return start + (end - start) / (high - low) * (tokens - low)


def evenly(steps: int) -> list[float]:
    """Sampling sigmas from 1 to 1 / steps, still to be shifted, as the pipelines of FLUX and later ones give them."""
    return np.linspace(1.0, 1 / steps, steps).tolist()
