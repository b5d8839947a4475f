"""What the schedulers of diffusers say of noise, read from those that were compared with it and from no others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from visiontune.errors import UserError

Prediction = Literal["eps", "v", "x0", "flow"]
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

# Samplers of a table of alphas. How one places its own timesteps does not matter: it is read for the table alone.
_TABLES = (
    DDIMScheduler,
    DDIMParallelScheduler,
    DDPMScheduler,
    DDPMParallelScheduler,
    PNDMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    KDPM2DiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    DEISMultistepScheduler,
    UniPCMultistepScheduler,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
)
# Samplers of flow, with the settings that they need for the grid to be one of alpha = 1 - sigma.
_SOLVER = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
}
_FLOWS: dict[type, dict[str, Any]] = {
    FlowMatchEulerDiscreteScheduler: {"invert_sigmas": False},
    FlowMatchHeunDiscreteScheduler: {},
    UniPCMultistepScheduler: _SOLVER,
    DPMSolverMultistepScheduler: {**_SOLVER, "use_lu_lambdas": False, "time_shift_type": "exponential"},
}


def prediction_of(scheduler: Any) -> Prediction:
    """What the network predicts that `scheduler` samples.

    Raises:
        UserError: a class whose levels were not compared with those of a `Schedule`, or a setting that changes them.
    """
    kind, config = type(scheduler), scheduler.config
    told = config.get("prediction_type", "epsilon")
    solver = bool(config.get("use_flow_sigmas")) or told == "flow_prediction"
    if kind in _FLOWS and (solver or kind not in _TABLES):
        _require(scheduler, _FLOWS[kind])
        return "flow"
    if kind not in _TABLES or solver:
        flow = " for flow" if solver else ""
        raise UserError(
            f"scheduler {kind.__name__} is not supported{flow}: give the model a DDIM, PNDM, DDPM or Euler scheduler,"
            " or for flow FlowMatchEuler, UniPC or DPM++"
        )
    _require(scheduler, {"timestep_type": "discrete"})
    if told not in _PREDICTIONS:
        raise UserError(
            f"scheduler {kind.__name__} with prediction_type={json.dumps(told)} is not supported: set it to what the"
            f" network predicts, one of {', '.join(_PREDICTIONS)}"
        )
    return _PREDICTIONS[told]


def _require(scheduler: Any, settings: Mapping[str, Any]) -> None:
    for key, needed in settings.items():
        value = scheduler.config.get(key, needed)
        if value != needed:
            raise UserError(
                f"scheduler {type(scheduler).__name__} with {key}={json.dumps(value)} is not supported: set it to"
                f" {json.dumps(needed)}"
            )


def ddim_scheduler(scheduler: Any) -> Any:
    """A DDIM scheduler with the levels, prediction and spacing of `scheduler`, to the last bit.

    It clips nothing, since latents are not bounded by 1. `DDIMScheduler.from_config` would clip by default, would put
    its own defaults where `scheduler` used defaults, and knows nothing of a shifted signal-to-noise ratio.
    """
    options = table_options(scheduler)
    # Samplers in sigmas say by another name whether the last step ends clean.
    to_one = scheduler.config.get("set_alpha_to_one", options.pop("final_sigmas_type", "zero") == "zero")
    made: Any = DDIMScheduler(clip_sample=False, set_alpha_to_one=to_one, **options)
    made.alphas_cumprod = scheduler.alphas_cumprod.cpu().clone()
    made.final_alpha_cumprod = torch.ones(()) if to_one else made.alphas_cumprod[0]
    return made


def table_options(scheduler: Any) -> dict[str, Any]:
    """The options by which a sampler of a table takes over the levels and spacing of `scheduler`, up to rounding."""
    kept = ("prediction_type", "timestep_spacing", "steps_offset", "final_sigmas_type")
    options = {key: scheduler.config[key] for key in kept if key in scheduler.config}
    squared = scheduler.alphas_cumprod.cpu().double()
    # Samplers that divide by alpha put this where the signal ends at zero.
    squared = torch.where(squared > 0, squared, 2.0**-24)
    betas = 1 - squared / torch.cat([squared.new_ones(1), squared[:-1]])
    return {**options, "num_train_timesteps": len(betas), "trained_betas": betas.tolist()}


def flow_spacing(scheduler: Any) -> Any:
    """A fresh scheduler that places the sampling sigmas of the flow sampler `scheduler`."""
    kind: Any = type(scheduler)
    if kind is FlowMatchHeunDiscreteScheduler:  # Euler's, all but the first of them twice
        kind = FlowMatchEulerDiscreteScheduler
    return kind.from_config(scheduler.config)


def flow_shift(spacing: Any, mu: float | None = None) -> float:
    """k of the shift k sigma / (1 + (k - 1) sigma) of a `flow_spacing`, before `shift_terminal` and Karras' like.

    Args:
        mu: the shift by resolution, for schedulers with `use_dynamic_shifting`; others take no notice.

    Raises:
        UserError: mu is missing.
    """
    config = spacing.config
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    mu = _required(mu)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _required(mu: float | None) -> float:
    if mu is None:
        raise UserError("the scheduler shifts timesteps by resolution: give mu, or set use_dynamic_shifting=false")
    return mu


def flow_sigmas(spacing: Any, steps: int, mu: float | None = None, sigmas: Sequence[float] | None = None) -> Tensor:
    """Where `steps` steps of a `flow_spacing` stand, from the noisiest to the clean end: [steps + 1] float32, CPU.

    Args:
        mu: the shift by resolution, for schedulers with `use_dynamic_shifting`; others take no notice.
        sigmas: [steps] sigmas to shift in place of the scheduler's own.

    Raises:
        UserError: mu is missing, the scheduler takes no sigmas, or the result does not fall from 1 to 0.
    """
    name, dynamic = type(spacing).__name__, spacing.config.get("use_dynamic_shifting", False)
    if sigmas is not None and isinstance(spacing, DPMSolverMultistepScheduler):
        raise UserError(f"scheduler {name} takes no sigmas: leave them out, or give the model FlowMatchEuler or UniPC")
    options: dict[str, Any] = {"mu": _required(mu)} if dynamic else {}
    if sigmas is not None:
        options["sigmas"] = np.asarray(sigmas, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # judged below
        spacing.set_timesteps(steps, **options)
    grid = spacing.sigmas.clone()
    if abs(grid[0] - 1) < 2e-6:
        # Pure noise, but for rounding or, in UniPC, for a millionth that keeps its logarithms finite: 1 - sigma must be
        # neither negative nor next to nothing where it divides.
        grid[0] = 1
    if len(grid) != steps + 1 or grid[0] > 1 or not (grid.diff() <= 0).all():
        raise UserError(
            f"scheduler {name} places no sigmas that fall from 1 to 0 at steps={steps}: give more steps or other sigmas"
        )
    return grid
