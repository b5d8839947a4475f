"""Schedules: the algebra of predictions, and agreement with the schedulers they are made from."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from visiontune.diffusion.schedule import Schedule, calculate_mu, shifted
from visiontune.diffusion.transition import transition
from visiontune.errors import UserError

TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


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


@pytest.mark.parametrize(
    "name",
    [
        *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
        *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"),
        *("UniPCMultistepScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
        *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
        *("LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    ],
)
def test_levels_are_those_of_every_scheduler_that_is_taken(name):
    scheduler = getattr(diffusers, name).from_config({"timestep_spacing": "trailing", **SD})
    schedule = Schedule.from_scheduler(scheduler)
    assert torch.equal(schedule.alphas[:-1].square().float(), scheduler.alphas_cumprod.float())
    x_0, eps, _ = draw(schedule, torch.float32)
    scheduler.set_timesteps(50)  # some mix noise in by the place in the chain
    whole = scheduler.timesteps[scheduler.timesteps == scheduler.timesteps.round()].unique()
    t = whole[torch.linspace(1, len(whole) - 1, 7).long()]
    x_t = scheduler.add_noise(x_0, eps, t)
    if scheduler.init_noise_sigma != 1:  # x_0 + sigma eps, of which the network is shown alpha times as much
        x_t = x_t * schedule.alpha(t)[:, None, None, None]
    torch.testing.assert_close(x_t, schedule.add_noise(x_0, eps, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_shifted_signal_to_noise_ratio_is_in_the_levels_and_in_ddim(kind, scale):
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = kind(snr_shift_scale=scale, **options, **SD)
    schedule, ddim = Schedule.from_scheduler(scheduler), Schedule.from_scheduler(scheduler).ddim()
    assert torch.equal(schedule.alphas[:-1].square().float(), scheduler.alphas_cumprod.float())
    assert torch.equal(ddim.alphas_cumprod, scheduler.alphas_cumprod)
    assert schedule.alpha(torch.tensor([999, -1])).tolist() == [0.0, 1.0]
    # Whoever makes the scheduler anew from its settings gets the same levels, but for rounding.
    again = DDIMScheduler.from_config(ddim.config)
    torch.testing.assert_close(again.alphas_cumprod, scheduler.alphas_cumprod.float(), rtol=1e-4, atol=1e-7)


def test_the_chain_of_a_shifted_ratio_is_that_of_the_stock_samplers():
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    stock = CogVideoXDDIMScheduler(snr_shift_scale=1.5, clip_sample=False, **options, **SD)
    schedule = Schedule.from_scheduler(stock)
    start, end = schedule.timesteps(7)
    ours, _, _ = draw(schedule)
    ddim = schedule.ddim()
    stock.set_timesteps(7)
    ddim.set_timesteps(7)
    assert start.tolist() == stock.timesteps.tolist() == ddim.timesteps.tolist()
    theirs = made = ours
    for t, t_next in zip(start, end, strict=True):
        ours, _ = transition(schedule, torch.tanh(ours + t / 500), ours, t.expand(7), t_next.expand(7))
        theirs = stock.step(torch.tanh(theirs + t / 500), t, theirs).prev_sample
        made = ddim.step(torch.tanh(made + t / 500), t, made).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, made, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
def test_at_zero_terminal_snr_only_eps_says_nothing_of_the_clean_latents(prediction):
    scheduler = DDIMScheduler(prediction_type=TYPES[prediction], rescale_betas_zero_snr=True, **SD)
    schedule = Schedule.from_scheduler(scheduler)
    x_0, eps, _ = draw(schedule)
    t = torch.full((7,), 999)
    assert schedule.snr(t).tolist() == schedule.alpha(t).tolist() == [0.0] * 7
    x_t = schedule.add_noise(x_0, eps, t)
    assert torch.equal(x_t, eps)
    pred = schedule.target(x_0, eps, t)
    torch.testing.assert_close(schedule.to_eps(pred, x_t, t), eps)
    ahead = torch.full((7,), 0.6, dtype=torch.float64)
    of_x, of_pred = schedule.weights(t, ahead, (1 - ahead.square()).sqrt())
    if prediction == "eps":
        assert not schedule.to_x_0(pred + 1, x_t, t).isfinite().any()
        assert not of_x.isfinite().any()
        return
    torch.testing.assert_close(schedule.to_x_0(pred, x_t, t), x_0)
    stepped = of_x[:, None, None, None] * x_t + of_pred[:, None, None, None] * pred
    torch.testing.assert_close(stepped, 0.6 * x_0 + 0.8 * eps)


@pytest.mark.parametrize(("ends", "level"), [("zero", 1.0), ("sigma_min", None)])
def test_samplers_in_sigmas_say_where_the_chain_ends(ends, level):
    schedule = Schedule.from_scheduler(EulerDiscreteScheduler(final_sigmas_type=ends, **SD))
    expected = schedule.alpha(torch.tensor([0])) if level is None else torch.tensor([level])
    torch.testing.assert_close(schedule.alpha(torch.tensor([-1])), expected)


GRIDS = [
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {}),
    (FlowMatchEulerDiscreteScheduler, {"shift": 1.73, "num_train_timesteps": 500}, {}),
    (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}, {"mu": 0.83}),
    (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 1.7}),
    (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True, "shift_terminal": 0.02}, {"mu": 0.6}),
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {"mu": 0.6}),
    (FlowMatchEulerDiscreteScheduler, {"use_karras_sigmas": True}, {}),
    (FlowMatchEulerDiscreteScheduler, {"use_beta_sigmas": True, "shift": 2.0}, {}),
    (FlowMatchEulerDiscreteScheduler, {"use_exponential_sigmas": True}, {}),
    (UniPCMultistepScheduler, {"flow_shift": 5.0, **FLOW}, {}),
    (UniPCMultistepScheduler, {"flow_shift": 12.0, "solver_order": 3, **FLOW}, {}),
    (UniPCMultistepScheduler, {"use_dynamic_shifting": True, "shift_terminal": 0.1, **FLOW}, {"mu": 0.9}),
    (DPMSolverMultistepScheduler, {"flow_shift": 3.0, **FLOW}, {}),
    (DPMSolverMultistepScheduler, {"use_dynamic_shifting": True, **FLOW}, {"mu": 0.9}),
    (FlowMatchHeunDiscreteScheduler, {"shift": 3.0}, {}),
]


@pytest.mark.parametrize(("kind", "options", "told"), GRIDS)
@pytest.mark.parametrize("steps", [4, 30])
@pytest.mark.parametrize("own", [False, True])
def test_flow_grids_are_those_of_the_stock_scheduler(kind, options, told, steps, own):
    takes = kind in (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler)
    if own and not takes:
        with pytest.raises(UserError) if kind is DPMSolverMultistepScheduler else pytest.raises(TypeError):
            Schedule.from_scheduler(kind(**options)).timesteps(steps, sigmas=[1.0] * steps, **told)
            kind(**options).set_timesteps(steps, sigmas=[1.0] * steps)  # Heun's takes none, but ours shifts them
        return
    sigmas = {"sigmas": np.linspace(1, 1 / steps, steps)} if own else {}
    stock = kind(**options)
    asked = told if takes or stock.config.get("use_dynamic_shifting") else {}
    stock.set_timesteps(steps, **asked, **sigmas)
    expected = stock.sigmas
    if kind is FlowMatchHeunDiscreteScheduler:
        expected = torch.cat([expected[:1], expected[1::2]])
    start, end = Schedule.from_scheduler(kind(**options)).timesteps(steps, **told, **sigmas)
    train = stock.config.num_train_timesteps
    assert start.dtype == end.dtype == torch.float32
    torch.testing.assert_close(torch.cat([start, end[-1:]]) / train, expected, rtol=0, atol=1.1e-6)
    assert torch.equal(start[1:], end[:-1])
    assert end[-1] == 0


OTHERWISE = {"shift_terminal", "use_karras_sigmas", "use_beta_sigmas", "use_exponential_sigmas"}


@pytest.mark.parametrize(("kind", "options", "told"), [case for case in GRIDS if not OTHERWISE & {*case[1]}])
def test_the_shift_of_a_sampler_is_that_of_its_grid(kind, options, told):
    """Undone of it, the levels are spread evenly."""
    schedule = Schedule.from_scheduler(kind(**options))
    start, _ = schedule.timesteps(30, **told)
    k = schedule.sampling_shift(**told)
    places = shifted(start.double() / schedule.num_train_timesteps, 1 / k).diff()
    torch.testing.assert_close(places, places.mean().expand_as(places), rtol=1e-2, atol=1e-6)
    assert k != 1


def test_what_has_no_shift_or_lacks_what_it_depends_on():
    assert make("eps").sampling_shift() == make("v").sampling_shift(0.5) == 1
    assert Schedule.flow(shift=3.0).sampling_shift() == 3
    with pytest.raises(UserError, match="give mu, or set use_dynamic_shifting=false"):
        Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)).sampling_shift()


def test_a_family_s_own_sigmas_may_come_as_a_list_and_are_shifted_without_a_scheduler_too():
    sigmas = [1.0, 0.75, 0.5, 0.25]
    schedule = Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    plain = Schedule.flow(shift=3.0)
    expected = [1000.0, 900.0, 750.0, 500.0]
    for made in (schedule, plain):
        torch.testing.assert_close(made.timesteps(4, sigmas=sigmas)[0], torch.tensor(expected))
    with pytest.raises(ValueError, match="4 of flow with steps=5"):
        schedule.timesteps(5, sigmas=sigmas)
    with pytest.raises(ValueError, match="sigmas are for flow"):
        make("eps").timesteps(4, sigmas=sigmas)
    with pytest.raises(UserError, match="no sigmas that fall from 1 to 0 at steps=4"):
        schedule.timesteps(4, sigmas=sigmas[::-1])
    with pytest.raises(UserError, match="steps=1: give more steps"):
        Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)).timesteps(1)


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(flow_shift=5.0, **FLOW),
        FlowMatchEulerDiscreteScheduler(shift=1.18),
        FlowMatchEulerDiscreteScheduler(shift=1.32),
    ],
    ids=["a millionth less", "rounded down", "rounded up"],
)
def test_a_chain_starts_at_pure_noise_exactly(scheduler):
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[0] != 1
    schedule = Schedule.from_scheduler(scheduler)
    start, _ = schedule.timesteps(4)
    assert schedule.alpha(start)[0] == 0


@pytest.mark.parametrize(("mu", "match"), [(None, "give mu"), (0.5, None)])
@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_solvers_that_shift_by_resolution_need_mu(kind, mu, match):
    schedule = Schedule.from_scheduler(kind(use_dynamic_shifting=True, **FLOW))
    if match is None:
        assert not torch.equal(schedule.timesteps(4, mu=mu)[0], schedule.timesteps(4, mu=1.0)[0])
        assert torch.equal(schedule.timesteps(4, mu=mu)[0], schedule.timesteps(4, mu=mu)[0])
        return
    schedule.timesteps(4, mu=0.5)
    with pytest.raises(UserError, match=match):
        schedule.timesteps(4, mu=mu)


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 8000])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024},
        {"max_shift": 0.9, "max_image_seq_len": 8192},
    ],
)
def test_mu_is_that_of_the_stock_pipelines(tokens, config):
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **config).config
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    expected = calculate_shift(tokens, *(stock[name] for name in names))
    assert calculate_mu(tokens, stock) == pytest.approx(expected, abs=1e-12)
    assert calculate_mu(tokens, config) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("LCMScheduler", {}, "scheduler LCMScheduler is not supported: give the model a DDIM"),
        ("TCDScheduler", {}, "scheduler TCDScheduler is not supported"),
        ("EDMDPMSolverMultistepScheduler", {}, "EDMDPMSolverMultistepScheduler is not supported"),
        ("CMStochasticIterativeScheduler", {}, "CMStochasticIterativeScheduler is not supported"),
        ("SCMScheduler", {}, "SCMScheduler is not supported"),
        ("FlowMatchLCMScheduler", {}, "FlowMatchLCMScheduler is not supported"),
        ("DEISMultistepScheduler", FLOW, "DEISMultistepScheduler is not supported for flow: .* UniPC or DPM"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "with invert_sigmas=true .*: set it to false"),
        ("UniPCMultistepScheduler", {**FLOW, "use_flow_sigmas": False}, "use_flow_sigmas=false .*: set it to true"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, 'prediction_type="epsilon" .* "flow_prediction"'),
        ("UniPCMultistepScheduler", {**FLOW, "use_karras_sigmas": True}, "use_karras_sigmas=true"),
        ("UniPCMultistepScheduler", {**FLOW, "use_exponential_sigmas": True}, "use_exponential_sigmas=true"),
        ("DPMSolverMultistepScheduler", {**FLOW, "use_beta_sigmas": True}, "use_beta_sigmas=true"),
        ("DPMSolverMultistepScheduler", {**FLOW, "use_lu_lambdas": True}, "use_lu_lambdas=true"),
        ("DPMSolverMultistepScheduler", {**FLOW, "time_shift_type": "linear"}, 'time_shift_type="linear"'),
        ("UniPCMultistepScheduler", {**FLOW, "final_sigmas_type": "sigma_min"}, 'set it to "zero"'),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, 'timestep_type="continuous" .* "discrete"'),
        ("DDPMScheduler", {"prediction_type": "score"}, 'prediction_type="score" .* epsilon, v_prediction, sample'),
    ],
)
def test_what_was_not_compared_is_refused_by_class_and_setting(name, options, match):
    with pytest.raises(UserError, match=match) as refused:
        Schedule.from_scheduler(getattr(diffusers, name)(**options))
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_scheduler_that_only_derives_from_one_that_is_taken_is_refused():
    class Other(DDIMScheduler):
        pass

    with pytest.raises(UserError, match="Other is not supported"):
        Schedule.from_scheduler(Other(**SD))
