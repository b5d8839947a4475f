"""The stock samplers that a user asks for by name, made to fit a model's noise schedule.

`from_config` from one class of scheduler to another puts defaults where the settings have other names: a flow model
then runs on a table of alphas, without a word.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from visiontune.diffusion._schedulers import (
    ddim_scheduler,
    flow_sigmas,
    flow_spacing,
    prediction_of,
    table_options,
)
from visiontune.errors import UserError

# What stock pipelines read from a flow scheduler to compute mu.
_RESOLUTION = ("use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def sampler_names(scheduler: Any) -> tuple[str, ...]:
    """The samplers that fit the noise schedule of `scheduler`; the first is the one that rollouts step by.

    `model` is the scheduler itself. It is all that there is for one that `Schedule.from_scheduler` refuses, and for
    masked tokens, which have no noise schedule.
    """
    try:
        flow = prediction_of(scheduler) == "flow"
    except UserError:
        return ("model",)
    return (*_FLOW, "model") if flow else ("ddim", *_TABLE, "model")


def make_sampler(name: str, scheduler: Any) -> Any:
    """A fresh stock scheduler that samples what `scheduler` samples.

    All but `model` and `lcm` are deterministic, and all but `model` clip nothing. On a table of alphas each but `lcm`,
    which starts at its last, places its own timesteps, by the `timestep_spacing` and `steps_offset` of `scheduler`.
    For flow they are shifted as those of `scheduler` are, by resolution too; `euler` stands where `Schedule.timesteps`
    does.

    Args:
        name: one of `sampler_names(scheduler)`.

    Raises:
        UserError: another name.
    """
    names = sampler_names(scheduler)
    if name not in names:
        raise UserError(f"sampler '{name}' does not fit {type(scheduler).__name__}: use one of {', '.join(names)}")
    if name == "model":
        return copy.deepcopy(scheduler)
    if name == "ddim":
        return ddim_scheduler(scheduler)
    if prediction_of(scheduler) == "flow":
        return _flow_sampler(name, scheduler)
    options = table_options(scheduler)
    if name == "lcm":
        options.pop("final_sigmas_type", None)  # which it has no word for
    return _TABLE[name](**options)


def _flow_sampler(name: str, scheduler: Any) -> Any:
    base = flow_spacing(scheduler)
    if name == "euler" and isinstance(scheduler, _EULER):
        base.register_to_config(stochastic_sampling=False)
        return base
    solver = {} if name == "euler" else {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    made = _FLOW[name](num_train_timesteps=base.config.num_train_timesteps, **solver)
    made.register_to_config(**{key: base.config[key] for key in _RESOLUTION if key in base.config})
    made.base = base
    return made


class _OnGrid:
    """A flow solver on the sampling sigmas of another scheduler, `base`, and with timesteps that are not rounded.

    FlowMatchEuler's end in a very small one, by which a solver of higher order loses more than it gains: what is
    shifted is then placed as UniPC places it.
    """

    base: Any
    largest = 1.0

    def set_timesteps(
        self: Any,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """As the stock method of the same name."""
        steps, train = num_inference_steps if sigmas is None else len(sigmas), self.config.num_train_timesteps
        if sigmas is None and isinstance(self.base, FlowMatchEulerDiscreteScheduler):
            sigmas = np.linspace(1, 1 / train, steps + 1)[:-1]
        grid = flow_sigmas(self.base, steps, mu, sigmas)
        # This empties the solver's memory. Where it would stand itself is then put right.
        own = {"mu": 0.0} if self.config.use_dynamic_shifting else {}
        super().set_timesteps(steps, device=device, **own)  # type: ignore[misc]
        self.timesteps = (grid[:-1] * train).to(device)
        self.sigmas = grid.clamp(max=self.largest)


class _Euler(_OnGrid, FlowMatchEulerDiscreteScheduler):
    pass


class _DPM(_OnGrid, DPMSolverMultistepScheduler):
    largest = 1 - 1e-6  # the solvers take the logarithm of 1 - sigma


class _UniPC(_OnGrid, UniPCMultistepScheduler):
    largest = 1 - 1e-6


class _LCM(LCMScheduler):
    """Multistep sampling of a consistency model: each step goes to a clean picture, which is noised again."""

    def set_timesteps(self: Any, num_inference_steps: Any = None, device: Any = None, **options: Any) -> None:
        """As the stock method of the same name, but in any number of steps: it takes them from a grid of 50."""
        grid = max(num_inference_steps or 0, self.config.original_inference_steps)
        told = {"original_inference_steps": grid, **options}
        super().set_timesteps(num_inference_steps, device, **told)  # type: ignore[misc]


_TABLE: dict[str, Any] = {
    "euler": EulerDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": _LCM,
}
_EULER = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
_FLOW: dict[str, Any] = {"euler": _Euler, "dpm++": _DPM, "unipc": _UniPC}
