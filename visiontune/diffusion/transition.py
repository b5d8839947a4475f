"""One reverse step as a Gaussian: p(x_next | x_t) = N(mean, std^2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from visiontune.diffusion.schedule import Schedule


class Dynamics(Protocol):
    """How much fresh noise a step adds. Any amount up to sigma_next leaves the marginals of x_t as they are."""

    @property
    def stochastic(self) -> bool:
        """False where `std` is 0 at every step, so that no noise is drawn."""
        ...

    def std(self, alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> Tensor:
        """Standard deviation of the fresh noise, in the shape of its arguments."""
        ...


@dataclass(frozen=True, kw_only=True)
class DDIM:
    """Song et al. (2021), equation 16: eta 0 is deterministic, 1 has the variance of DDPM's posterior.

    The formula is written for any alpha and sigma; with alpha^2 + sigma^2 = 1 it is the paper's.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"eta must not be negative, got {self.eta}")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def std(self, alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> Tensor:
        variance = (sigma_next / sigma).square() * (sigma.square() - (alpha / alpha_next * sigma_next).square())
        return self.eta * variance.clamp(min=0).sqrt()


def transition(
    schedule: Schedule, pred: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, dynamics: Dynamics | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x at `t_next`, given x at `t` (Song et al., 2021, equation 12).

    Args:
        schedule: gives the levels of both timesteps and the meaning of `pred`.
        pred: [b, ...] the network's prediction at x_t, after any guidance.
        x_t: [b, ...].
        t, t_next: [b] integer timesteps; a negative `t_next` is the end of the chain.
        dynamics: the noise to add; default DDIM(eta=0).

    Returns:
        mean [b, ...] and std [b, 1, ...], both at least float32.
    """
    dynamics = dynamics or DDIM()
    alpha, sigma = schedule.levels(t, x_t.ndim)
    alpha_next, sigma_next = schedule.levels(t_next, x_t.ndim)
    std = dynamics.std(alpha, sigma, alpha_next, sigma_next)
    direction = (sigma_next.square() - std.square()).clamp(min=0).sqrt()
    x_0 = schedule.to_x_0(pred, x_t, t)
    eps = schedule.to_eps(pred, x_t, t)
    mean = alpha_next.to(x_0.dtype) * x_0 + direction.to(eps.dtype) * eps
    return mean, std.to(mean.dtype)
