"""How a sampler steps back: what share of the noise it keeps, and how much fresh noise it adds.

A step is the Gaussian N(alpha_next x_0 + direction eps, std^2), with x_0 and eps as the prediction implies them.
`make_dynamics` finds one by the name that a recipe gives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from visiontune import schema
from visiontune.errors import UserError
from visiontune.schema import option


class Levels(NamedTuple):
    """alpha and sigma where a step starts and where it ends, tensors of one shape."""

    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor


class Dynamics(ABC):
    """A way to step back; each class says whether the marginals of x_t stay as they are.

    Attributes:
        name: the recipe's name for it.
        flow: whether it is written for alpha = 1 - sigma alone.
        remedy: what to change in a recipe that needs noise where this adds none.
    """

    name: ClassVar[str]
    flow: ClassVar[bool] = False
    remedy: ClassVar[str] = "set its eta above 0"

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """False where `std` is 0 at every step, so that no noise is drawn."""

    @abstractmethod
    def std(self, at: Levels) -> Tensor:
        """Standard deviation of the fresh noise."""

    def direction(self, at: Levels) -> Tensor:
        """Weight of the predicted noise; with the fresh noise it makes up sigma_next, unless overridden."""
        return (at.sigma_next.square() - self.std(at).square()).clamp(min=0).sqrt()

    def check(self, prediction: str) -> None:
        """Raise UserError where a model that predicts `prediction` cannot be sampled so."""
        if self.flow and prediction != "flow":
            raise UserError(
                f"dynamics '{self.name}' is for flow models and this one predicts {prediction}: use ddim, ddpm or cps"
            )

    def require_noise(self) -> None:
        """Raise UserError where no step adds noise, so that none has a log-probability."""
        if not self.stochastic:
            raise UserError(f"dynamics '{self.name}' adds no noise, so no step has a log-probability: {self.remedy}")


@dataclass(frozen=True, kw_only=True)
class _Scaled(Dynamics):
    """Noise in proportion to eta, or growing with it."""

    eta: float

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"eta must not be negative, got {self.eta}")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0


def _variance(at: Levels) -> Tensor:
    """Var[x_t | x_next] of the forward process; beta_t where the timesteps are neighbours."""
    return (at.sigma.square() - (at.alpha / at.alpha_next * at.sigma_next).square()).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class DDIM(_Scaled):
    """Song et al. (2021), equation 16, for any alpha and sigma.

    Given x_0 every eta up to 1 keeps the marginals; with the mean of x_0 that a denoiser knows, in the limit of short
    steps.
    """

    name: ClassVar[str] = "ddim"
    eta: float = option(0.0, least=0, greatest=10, help="0 is deterministic, 1 has the variance of DDPM's posterior")

    def std(self, at: Levels) -> Tensor:
        return self.eta * at.sigma_next / at.sigma * _variance(at).sqrt()


@dataclass(frozen=True, kw_only=True)
class DDPM(Dynamics):
    """Ancestral sampling, Ho et al. (2020), equation 7; `fixed_small` is DDIM with eta 1.

    `fixed_large` has the variance of the forward process and so too much noise for long strides; the step to a clean
    end adds none.
    """

    name: ClassVar[str] = "ddpm"
    variance: Literal["fixed_small", "fixed_large"] = option(
        "fixed_small", help="variance of the posterior, or of the forward process"
    )

    @property
    def stochastic(self) -> bool:
        return True

    def std(self, at: Levels) -> Tensor:
        if self.variance == "fixed_small":
            return at.sigma_next / at.sigma * _variance(at).sqrt()
        return torch.where(at.sigma_next > 0, _variance(at).sqrt(), 0.0)

    def direction(self, at: Levels) -> Tensor:
        return at.alpha / at.alpha_next * at.sigma_next.square() / at.sigma


@dataclass(frozen=True, kw_only=True)
class FlowODE(Dynamics):
    """Euler steps along the velocity, x_next = x_t + (sigma_next - sigma) v."""

    name: ClassVar[str] = "flow-ode"
    flow: ClassVar[bool] = True
    remedy: ClassVar[str] = "use flow-sde, dance-sde or cps"

    @property
    def stochastic(self) -> bool:
        return False

    def std(self, at: Levels) -> Tensor:
        return torch.zeros_like(at.sigma)


@dataclass(frozen=True, kw_only=True)
class _FlowSDE(_Scaled):
    """Euler-Maruyama steps of dx = (v + s^2 eps / (2 sigma)) dt + s dw, dt < 0.

    The marginals are kept in the limit of short steps; a long one leaves too much noise.
    """

    flow: ClassVar[bool] = True

    @abstractmethod
    def diffusion(self, at: Levels) -> Tensor:
        """s."""

    def std(self, at: Levels) -> Tensor:
        return self.diffusion(at) * (at.sigma - at.sigma_next).sqrt()

    def direction(self, at: Levels) -> Tensor:
        return at.sigma_next - self.std(at).square() / (2 * at.sigma)


@dataclass(frozen=True, kw_only=True)
class FlowSDE(_FlowSDE):
    """Flow-GRPO, Liu et al. (2025), arXiv 2505.05470: s = eta sqrt(sigma / (1 - sigma)).

    Within a thousandth of sigma = 1, where that is infinite, 1 - sigma is taken where the step ends.
    """

    name: ClassVar[str] = "flow-sde"
    eta: float = option(0.7, least=0, greatest=10, help="amount of noise, the paper's a; 0 is flow-ode")

    def diffusion(self, at: Levels) -> Tensor:
        return self.eta * (at.sigma / torch.where(at.alpha > 1e-3, at.alpha, at.alpha_next)).sqrt()


@dataclass(frozen=True, kw_only=True)
class DanceSDE(_FlowSDE):
    """DanceGRPO, Xue et al. (2025), arXiv 2505.07818: s = eta at every timestep."""

    name: ClassVar[str] = "dance-sde"
    eta: float = option(0.3, least=0, greatest=10, help="amount of noise; 0 is flow-ode")

    def diffusion(self, at: Levels) -> Tensor:
        return torch.full_like(at.sigma, self.eta)


@dataclass(frozen=True, kw_only=True)
class CPS(_Scaled):
    """Coefficients-preserving sampling, Wang and Yu (2025), arXiv 2509.05952.

    The shares cos(eta pi / 2) and sin(eta pi / 2) of sigma_next are old and fresh noise: as DDIM's, given x_0 they keep
    the marginals. The share of fresh noise does not shrink with the steps, so more steps are no better approximation.
    The last step, to a clean end, adds none.
    """

    name: ClassVar[str] = "cps"
    eta: float = option(0.7, least=0, greatest=1, help="0 is deterministic, 1 replaces all noise at every step")

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {self.eta}")

    def std(self, at: Levels) -> Tensor:
        return math.sin(self.eta * math.pi / 2) * at.sigma_next

    def direction(self, at: Levels) -> Tensor:
        return (math.cos(self.eta * math.pi / 2) if self.eta < 1 else 0.0) * at.sigma_next


DYNAMICS: dict[str, type[Dynamics]] = {kind.name: kind for kind in (DDIM, DDPM, FlowODE, FlowSDE, DanceSDE, CPS)}


def make_dynamics(spec: str | Mapping[str, Any] | Dynamics, path: str = "dynamics") -> Dynamics:
    """The dynamics that a recipe names: `ddim`, or `{name: ddim, eta: 1.0}`.

    Raises:
        UserError: an unknown name or option; the message starts with `path`.
    """
    if isinstance(spec, Dynamics):
        return spec
    if not isinstance(spec, (str, Mapping)):
        raise UserError(
            f"{path} must be a name, or a mapping such as {{name: ddim, eta: 1.0}}, not {schema.shown(spec)}"
        )
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in DYNAMICS:
        raise UserError(f"{path}.name: {schema.shown(name)} is not a dynamics{schema.nearest(str(name), DYNAMICS)}")
    return schema.from_mapping(DYNAMICS[name], options, path)
