"""One reverse step as a Gaussian p(x_next | x_t) = N(mean, std^2): its kernel, log-density and divergence."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from visiontune.diffusion.dynamics import DDIM, Dynamics, Levels
from visiontune.diffusion.schedule import Schedule

Reduce = Literal["mean", "sum"]


def kernel(schedule: Schedule, t: Tensor, t_next: Tensor, dynamics: Dynamics) -> tuple[Tensor, Tensor, Tensor]:
    """The step without the network: mean = of_x x_t + of_pred pred, and std.

    Args:
        t, t_next: [b] timesteps.

    Returns:
        of_x, of_pred and std, [b] float64.
    """
    at = Levels(*schedule.levels(t, 1), *schedule.levels(t_next, 1))
    of_x, of_pred = schedule.weights(t, at.alpha_next, dynamics.direction(at))
    return of_x, of_pred, dynamics.std(at)


def transition(
    schedule: Schedule, pred: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, dynamics: Dynamics | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x at `t_next`, given x at `t` (Song et al., 2021, equation 12).

    Args:
        schedule: gives the levels of both timesteps and the meaning of `pred`.
        pred: [b, ...] the network's prediction at x_t, after any guidance.
        x_t: [b, ...].
        t, t_next: [b] timesteps; a negative `t_next` is the end of the chain.
        dynamics: the noise to add; default DDIM(eta=0).

    Returns:
        mean [b, ...] and std [b, 1, ...], both at least float32.
    """
    dtype = torch.promote_types(torch.promote_types(x_t.dtype, pred.dtype), torch.float32)
    shape = (-1,) + (1,) * (x_t.ndim - 1)
    # In float64 up to here: the two weights are small differences of large terms.
    of_x, of_pred, std = (v.to(dtype).view(shape) for v in kernel(schedule, t, t_next, dynamics or DDIM()))
    return of_x * x_t + of_pred * pred, std


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, reduce: Reduce = "mean") -> Tensor:
    """Log-density of N(mean, std^2) at `x_next`, [b] float32 or wider.

    Args:
        x_next, mean: [b, ...].
        std: [b, 1, ...], above 0.
        reduce: "sum" is the log-density; "mean" is that divided by the number of values of a row, as DDPO's code has
            it, so that clip ranges do not depend on the resolution.

    Raises:
        ValueError: a step adds no noise, so that it has no density.
    """
    if bool((std <= 0).any()):
        raise ValueError("a step without noise has no log-probability: leave out the steps that are not `scored`")
    return _log_prob(x_next, mean, std, reduce)


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor, reduce: Reduce = "mean") -> Tensor:
    """KL(N(mean, std^2) || N(mean_ref, std^2)) = |mean - mean_ref|^2 / (2 std^2), [b], exact.

    Args:
        mean, mean_ref: [b, ...].
        std: [b, 1, ...], above 0, common to both.
        reduce: over the values of a row, as in `log_prob`.
    """
    if bool((std <= 0).any()):
        raise ValueError("a step without noise has no divergence: leave out the steps that are not `scored`")
    return _over_row(((_wide(mean) - _wide(mean_ref)) / _wide(std)).square() / 2, reduce)


def _log_prob(x_next: Tensor, mean: Tensor, std: Tensor, reduce: Reduce) -> Tensor:
    std = _wide(std)
    error = (_wide(x_next) - _wide(mean)) / std
    return _over_row(-error.square() / 2 - std.log() - math.log(2 * math.pi) / 2, reduce)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _over_row(x: Tensor, reduce: Reduce) -> Tensor:
    flat = x.flatten(1)
    return flat.sum(1) if reduce == "sum" else flat.mean(1)
