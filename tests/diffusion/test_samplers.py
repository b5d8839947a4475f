"""Samplers by name: each ends where the ODE of a Gaussian ends, on the levels of the model's own scheduler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AmusedScheduler,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from torch import Tensor

from visiontune.diffusion.samplers import make_sampler, sampler_names
from visiontune.diffusion.schedule import Schedule, calculate_mu
from visiontune.errors import UserError

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
MEAN, STD = 0.7, 0.5

TABLES = {
    "eps": DDIMScheduler(**SD),
    "zero-snr": DDIMScheduler(**SD, **ZERO_SNR),
    "x0": EulerDiscreteScheduler(prediction_type="sample", **SD),
    "pndm": PNDMScheduler(steps_offset=1, skip_prk_steps=True, set_alpha_to_one=True, **SD),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, timestep_spacing="trailing"),
    "snr-shift": CogVideoXDDIMScheduler(snr_shift_scale=1.5, **ZERO_SNR),
    "karras": DPMSolverMultistepScheduler(use_karras_sigmas=True, prediction_type="v_prediction", **SD),
}
FLOWS: dict[str, tuple[Any, dict[str, float]]] = {
    "euler": (FlowMatchEulerDiscreteScheduler(shift=3.0), {}),
    "mu": (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {"mu": 0.9}),
    "linear-mu": (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"), {"mu": 2.1}),
    "heun": (FlowMatchHeunDiscreteScheduler(shift=2.5), {}),
    "unipc": (UniPCMultistepScheduler(flow_shift=5.0, **FLOW), {}),
    "unipc-mu": (UniPCMultistepScheduler(use_dynamic_shifting=True, **FLOW), {"mu": 0.9}),
    "dpm": (DPMSolverMultistepScheduler(flow_shift=3.0, **FLOW), {}),
    "dpm-mu": (DPMSolverMultistepScheduler(use_dynamic_shifting=True, **FLOW), {"mu": 0.9}),
}


def predict(kind: str, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The exact prediction for data of N(MEAN, STD^2)."""
    variance = (alpha * STD) ** 2 + sigma**2
    eps = sigma * (x - alpha * MEAN) / variance
    x_0 = MEAN + alpha * STD**2 * (x - alpha * MEAN) / variance
    return {"epsilon": eps, "sample": x_0, "v_prediction": alpha * eps - sigma * x_0, "flow": eps - x_0}[kind]


def distance(sampler: Any, kind: str, levels: Callable[[float], tuple[float, float]], steps: int, **told: Any) -> float:
    """How far a stock loop with the exact denoiser ends from the end of the exact ODE, root mean square."""
    sampler.set_timesteps(steps, **told)
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    if kind != "flow":
        x = x * sampler.init_noise_sigma
    end = None
    for t in sampler.timesteps:
        seen = (x if kind == "flow" else sampler.scale_model_input(x, t)).double()
        alpha, sigma = levels(float(t))
        if end is None:
            end = MEAN + STD * (seen - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2) ** 0.5
        x = sampler.step(predict(kind, seen, alpha, sigma).float(), t, x).prev_sample
    assert end is not None
    return float((x - end).square().mean().sqrt())


def of_table(scheduler: Any) -> Callable[[float], tuple[float, float]]:
    """alpha and sigma at a timestep, between two of them by a straight line in sigma / alpha."""
    squared = scheduler.alphas_cumprod.double().clamp(min=1e-12)
    ratio = ((1 - squared) / squared).sqrt().numpy()

    def levels(t: float) -> tuple[float, float]:
        there = float(np.interp(t, np.arange(len(ratio)), ratio))
        alpha = (1 + there**2) ** -0.5
        return alpha, there * alpha

    return levels


def of_flow(t: float) -> tuple[float, float]:
    return 1 - t / 1000, t / 1000


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++", "unipc"])
@pytest.mark.parametrize("base", TABLES)
def test_on_a_table_every_sampler_ends_where_the_ode_does(base, name):
    scheduler = TABLES[base]
    assert sampler_names(scheduler) == ("ddim", "euler", "dpm++", "unipc", "lcm", "model")
    kind, levels = scheduler.config.prediction_type, of_table(scheduler)
    few, many = (distance(make_sampler(name, scheduler), kind, levels, steps) for steps in (20, 250))
    assert many < 0.02
    assert many < 0.4 * few


@pytest.mark.parametrize("name", ["euler", "dpm++", "unipc"])
@pytest.mark.parametrize("base", FLOWS)
def test_on_flow_every_sampler_ends_where_the_ode_does(base, name):
    scheduler, told = FLOWS[base]
    assert sampler_names(scheduler) == ("euler", "dpm++", "unipc", "model")
    few, many = (distance(make_sampler(name, scheduler), "flow", of_flow, steps, **told) for steps in (20, 250))
    assert many < (0.01 if name == "euler" else 0.001)
    assert many < 0.4 * few


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
@pytest.mark.parametrize("base", FLOWS)
def test_a_solver_of_higher_order_needs_fewer_steps(base, name):
    scheduler, told = FLOWS[base]
    ours, euler = (distance(make_sampler(n, scheduler), "flow", of_flow, 20, **told) for n in (name, "euler"))
    assert ours < 0.7 * euler


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_settings_of_flow_given_to_a_sampler_of_tables_end_elsewhere(kind):
    """What `from_config` makes of them: the test above can fail."""
    wrong = kind.from_config(FLOWS["euler"][0].config)
    assert distance(wrong, "flow", of_flow, 250) > 0.3


def test_levels_of_another_table_end_elsewhere():
    base = TABLES["snr-shift"]
    wrong = DDIMScheduler.from_config(base.config, clip_sample=False)
    assert distance(wrong, "v_prediction", of_table(base), 250) > 0.02


@pytest.mark.parametrize("base", TABLES)
def test_samplers_of_a_table_keep_its_meaning_and_spacing(base):
    scheduler = TABLES[base]
    for name in ("ddim", "euler", "dpm++", "unipc", "lcm"):
        made = make_sampler(name, scheduler)
        expected = scheduler.alphas_cumprod.float()
        torch.testing.assert_close(made.alphas_cumprod.float(), expected, rtol=1e-4, atol=1e-7)
        for key in ("prediction_type", "timestep_spacing", "steps_offset"):
            assert made.config[key] == scheduler.config.get(key, made.config[key])
        assert not made.config.get("clip_sample") and not made.config.get("use_karras_sigmas")
        assert made is not make_sampler(name, scheduler)


@pytest.mark.parametrize("steps", [1, 4, 50, 80])
def test_lcm_starts_at_the_last_timestep_in_any_number_of_steps(steps):
    sampler = make_sampler("lcm", TABLES["eps"])
    sampler.set_timesteps(steps)
    assert len(sampler.timesteps) == steps and sampler.timesteps[0] >= 950
    if steps <= 50:
        stock = LCMScheduler()
        stock.set_timesteps(steps)
        assert torch.equal(sampler.timesteps, stock.timesteps)


@pytest.mark.parametrize("steps", [5, 28])
@pytest.mark.parametrize("base", FLOWS)
def test_euler_stands_where_rollouts_do(base, steps):
    scheduler, told = FLOWS[base]
    sampler = make_sampler("euler", scheduler)
    sampler.set_timesteps(steps, **told)
    start, end = Schedule.from_scheduler(scheduler).timesteps(steps, **told)
    torch.testing.assert_close(sampler.timesteps, start, rtol=0, atol=2e-3)
    torch.testing.assert_close(sampler.sigmas, torch.cat([start[:1], end]) / 1000, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_solvers_shift_as_the_stock_solver_does(name):
    stock = UniPCMultistepScheduler(flow_shift=3.0, **FLOW)
    sampler = make_sampler(name, FlowMatchEulerDiscreteScheduler(shift=3.0))
    for steps in (4, 20):
        stock.set_timesteps(steps)
        sampler.set_timesteps(steps)
        torch.testing.assert_close(sampler.sigmas, stock.sigmas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["euler", "dpm++", "unipc"])
def test_stock_pipelines_shift_by_resolution_through_every_sampler(name):
    """They read the settings of mu from the scheduler's config and pass their own sigmas."""
    base = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.4, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    sampler = copy.deepcopy(make_sampler(name, base))
    config = sampler.config
    assert config.use_dynamic_shifting
    mu = calculate_shift(1024, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    assert mu == pytest.approx(calculate_mu(1024, base.config))
    timesteps, steps = retrieve_timesteps(sampler, 8, "cpu", sigmas=np.linspace(1, 1 / 8, 8), mu=mu)
    base.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=mu)
    assert steps == 8
    torch.testing.assert_close(timesteps, base.timesteps, rtol=0, atol=2e-3)
    torch.testing.assert_close(sampler.sigmas, base.sigmas, rtol=0, atol=2e-6)
    with pytest.raises(UserError, match="give mu") if name != "euler" else pytest.raises(ValueError, match="mu"):
        sampler.set_timesteps(8)


def test_euler_is_deterministic_where_the_model_s_own_scheduler_is_not():
    base = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert make_sampler("model", base).config.stochastic_sampling
    assert not make_sampler("euler", base).config.stochastic_sampling
    assert base.config.stochastic_sampling


@pytest.mark.parametrize(
    "scheduler",
    [
        TABLES["pndm"],
        FLOWS["unipc"][0],
        make_sampler("euler", FLOWS["unipc"][0]),
        LCMScheduler(),
        AmusedScheduler(mask_token_id=17),
    ],
)
def test_model_is_the_scheduler_itself_made_fresh(scheduler):
    made = make_sampler("model", scheduler)
    assert type(made) is type(scheduler) and made is not scheduler
    assert dict(made.config) == dict(scheduler.config)
    for sampler in (made, scheduler):
        sampler.set_timesteps(5)
    assert torch.equal(made.timesteps, scheduler.timesteps)


@pytest.mark.parametrize(
    ("scheduler", "name", "match"),
    [
        (FLOWS["euler"][0], "ddim", "FlowMatchEulerDiscreteScheduler: use one of euler, dpm\\+\\+, unipc, model"),
        (TABLES["eps"], "dim", "sampler 'dim' does not fit DDIMScheduler: use one of ddim, euler, dpm\\+\\+, unipc"),
        (LCMScheduler(), "dpm++", "LCMScheduler: use one of model"),
        (EDMEulerScheduler(), "euler", "EDMEulerScheduler: use one of model"),
        (AmusedScheduler(mask_token_id=17), "ddim", "AmusedScheduler: use one of model"),
    ],
)
def test_what_does_not_fit_is_refused_by_what_does(scheduler, name, match):
    with pytest.raises(UserError, match=match):
        make_sampler(name, scheduler)
