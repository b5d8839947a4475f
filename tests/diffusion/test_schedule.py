"""Schedules: the algebra of predictions, and agreement with the schedulers they are made from."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from visiontune.diffusion.schedule import Schedule
from visiontune.errors import UserError

TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def make(prediction: str) -> Schedule:
    if prediction == "flow":
        return Schedule.flow(1000)
    return Schedule.from_scheduler(DDPMScheduler(prediction_type=TYPES[prediction], **SD))


def draw(schedule: Schedule, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 7, 4, 8, 8, generator=generator, dtype=dtype)
    t = torch.tensor([0, 1, 17, 250, 500, 800, 999])
    return x_0, eps, t


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_the_exact_prediction_gives_back_clean_latents_and_noise(prediction):
    schedule = make(prediction)
    x_0, eps, t = draw(schedule)
    x_t = schedule.add_noise(x_0, eps, t)
    pred = schedule.target(x_0, eps, t)
    assert x_t.dtype == pred.dtype == torch.float64
    # float64 throughout: float32 tables would be off by 1e-7
    torch.testing.assert_close(schedule.to_x_0(pred, x_t, t), x_0, rtol=0, atol=1e-11)
    torch.testing.assert_close(schedule.to_eps(pred, x_t, t), eps, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_any_prediction_implies_a_pair_that_explains_x_t(prediction):
    schedule = make(prediction)
    x_t, pred, t = draw(schedule)
    x_0, eps = schedule.to_x_0(pred, x_t, t), schedule.to_eps(pred, x_t, t)
    if prediction == "flow":  # alpha + sigma = 1, so the pair is not a mix at sigma = 0
        t, x_t, x_0, eps = t[1:], x_t[1:], x_0[1:], eps[1:]
        pred = pred[1:]
    torch.testing.assert_close(schedule.add_noise(x_0, eps, t), x_t, rtol=0, atol=1e-10)
    torch.testing.assert_close(schedule.target(x_0, eps, t), pred, rtol=0, atol=1e-10)


def test_levels_noise_and_v_are_those_of_the_scheduler():
    scheduler = DDPMScheduler(prediction_type="v_prediction", **SD)
    schedule = Schedule.from_scheduler(scheduler)
    x_0, eps, t = draw(schedule, torch.float32)
    torch.testing.assert_close(schedule.add_noise(x_0, eps, t), scheduler.add_noise(x_0, eps, t))
    torch.testing.assert_close(schedule.target(x_0, eps, t), scheduler.get_velocity(x_0, eps, t))
    squared = scheduler.alphas_cumprod[t]
    torch.testing.assert_close(schedule.alpha(t), squared.sqrt())
    torch.testing.assert_close(schedule.sigma(t), (1 - squared).sqrt())
    torch.testing.assert_close(schedule.snr(t), squared / (1 - squared))
    assert schedule.alpha(t).dtype == schedule.sigma(t).dtype == schedule.snr(t).dtype == torch.float32
    assert schedule.num_train_timesteps == 1000


def test_flow_levels_are_linear_in_time():
    schedule = Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(num_train_timesteps=500))
    t = torch.tensor([0, 125, 500])
    assert (schedule.prediction, schedule.num_train_timesteps) == ("flow", 500)
    torch.testing.assert_close(schedule.sigma(t), torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(schedule.alpha(t), torch.tensor([1.0, 0.75, 0.0]))
    start, end = Schedule.flow(500).timesteps(4)
    assert start.tolist() == [500, 375, 250, 125]
    assert end.tolist() == [375, 250, 125, 0]


def test_low_precision_input_is_computed_in_float32():
    schedule = make("eps")
    x_0, eps, t = draw(schedule, torch.bfloat16)
    for value in (schedule.add_noise(x_0, eps, t), schedule.target(x_0, eps, t), schedule.to_x_0(eps, x_0, t)):
        assert value.dtype == torch.float32


@pytest.mark.parametrize(("to_one", "level"), [(True, 1.0), (False, None)])
def test_a_negative_timestep_is_the_end_of_the_chain(to_one, level):
    schedule = Schedule.from_scheduler(DDIMScheduler(set_alpha_to_one=to_one, **SD))
    expected = schedule.alpha(torch.tensor([0])) if level is None else torch.tensor([level])
    for t in (-1, -19):
        torch.testing.assert_close(schedule.alpha(torch.tensor([t])), expected)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_timesteps_are_those_of_ddim(spacing, offset, steps):
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset, **SD)
    start, end = Schedule.from_scheduler(scheduler).timesteps(steps)
    scheduler.set_timesteps(steps)
    assert start.tolist() == scheduler.timesteps.tolist()
    assert (start - end).tolist() == [1000 // steps] * steps


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_out_of_range_is_refused(steps):
    with pytest.raises(UserError, match=f"steps={steps} is out of range: give 1 to 1000"):
        make("eps").timesteps(steps)


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SD),
        EulerDiscreteScheduler(timestep_spacing="trailing", prediction_type="v_prediction", **SD),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, thresholding=True),
        DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", **SD),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_ddim_keeps_betas_and_meaning_and_clips_nothing(scheduler):
    schedule = Schedule.from_scheduler(scheduler)
    ddim = schedule.ddim()
    torch.testing.assert_close(ddim.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-6)
    assert not ddim.config.clip_sample
    assert not ddim.config.thresholding
    kept = {
        key: ddim.config[key] for key in ("prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one")
    }
    assert kept == {**kept, **{key: value for key, value in scheduler.config.items() if key in kept}}
    assert ddim is not schedule.ddim()


def test_schedulers_without_betas_are_refused_by_name():
    with pytest.raises(UserError, match="EDMEulerScheduler is not supported: give the model a DDIM"):
        Schedule.from_scheduler(EDMEulerScheduler())
    with pytest.raises(ValueError, match="flow"):
        Schedule.flow().ddim()
