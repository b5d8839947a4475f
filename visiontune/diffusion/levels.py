"""Levels of noise that hold for any model: shares of Stable Diffusion's schedule, by their signal-to-noise ratio.

A share of a table of timesteps is t / T. Flow has other noise at the same share: sigma = 1 / (1 + sqrt(SNR)), so that
share 0.9, the tenth of the timesteps that decides content, is sigma 0.893.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from visiontune.diffusion.schedule import Schedule

# Stable Diffusion's table: betas whose roots are evenly spaced.
_STEPS, _ROOTS = 1000, (0.00085**0.5, 0.012**0.5)


def sigma_of_snr(snr: Tensor) -> Tensor:
    """Noise level of flow, in [0, 1], with a signal-to-noise ratio alpha^2 / sigma^2."""
    return 1 / (1 + snr.sqrt())


def snr_of_sigma(sigma: Tensor) -> Tensor:
    """The inverse of :func:`sigma_of_snr`."""
    return ((1 - sigma) / sigma).square()


def shares(levels: Tensor, schedule: Schedule) -> Tensor:
    """Shares of a model's schedule with the noise that levels stand for; the ends 0 and 1 stay.

    Args:
        levels: any shape, in [0, 1]. schedule: the model's; one of timesteps has its shares as they are.

    Returns:
        float64, on the CPU, rising with the level.
    """
    # Levels come as float32, and neighbours must share their bound.
    told = levels.detach().cpu().double().round(decimals=6)
    if schedule.prediction != "flow":
        return told
    places, sigmas = _knots()
    return torch.from_numpy(np.interp(told.numpy(), places, sigmas))


@cache
def _knots() -> tuple[np.ndarray, np.ndarray]:
    """Shares of the table, and the sigmas with their noise; linear between them and towards the ends."""
    kept = np.cumprod(1 - np.linspace(*_ROOTS, _STEPS) ** 2)[1:]
    sigmas = sigma_of_snr(torch.from_numpy(kept / (1 - kept))).numpy()
    return np.linspace(0, 1, _STEPS + 1), np.concatenate([[0.0], sigmas, [1.0]])
