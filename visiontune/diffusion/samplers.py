"""TEMPORARY"""

from __future__ import annotations

from typing import Any

from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from visiontune.diffusion.schedule import ddim_scheduler
from visiontune.errors import UserError


def sampler_names(scheduler: Any) -> tuple[str, ...]:
    return ("model", "ddim", "dpm++", "euler")


def make_sampler(name: str, base: Any) -> Any:
    config = base.config
    if name == "ddim":
        return ddim_scheduler(base)
    if name == "dpm++":
        return DPMSolverMultistepScheduler.from_config(config)
    if name == "euler":
        return EulerDiscreteScheduler.from_config(config)
    if name == "model":
        return type(base).from_config(config)
    raise UserError(f"there is no scheduler '{name}'; known: ddim, dpm++, euler, model")
