"""Dynamics: diffusers' own steps, the papers' formulas, and the marginals of a Gaussian, all in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_rollout import SD, TinyModel, prompts, start

from visiontune.diffusion.dynamics import CPS, DDIM, DDPM, DanceSDE, FlowODE, FlowSDE, make_dynamics
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.diffusion.transition import transition
from visiontune.errors import UserError

ANCESTRAL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def draw(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("steps", [10, 1000])
def test_ddpm_is_the_step_of_its_scheduler(prediction, variance, steps):
    scheduler = DDPMScheduler(prediction_type=prediction, variance_type=variance, **ANCESTRAL)
    scheduler.set_timesteps(steps)
    schedule = Schedule.from_scheduler(scheduler)
    begin, end = schedule.timesteps(steps)
    assert begin.tolist() == scheduler.timesteps.tolist()
    for i in {0, 1, steps // 2, steps - 2, steps - 1}:
        x_t, pred = draw(2, i)
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(i), dtype=x_t.dtype)
        generator = torch.Generator().manual_seed(i)
        expected = scheduler.step(pred, int(begin[i]), x_t, generator=generator).prev_sample
        dynamics = DDPM(variance=variance.removesuffix("_log"))
        mean, std = transition(schedule, pred, x_t, begin[i].expand(2), end[i].expand(2), dynamics)
        # the reference has alphas, and their differences, in float32
        torch.testing.assert_close(mean + std * noise, expected, rtol=0, atol=3e-5)


def test_a_ddpm_rollout_is_the_loop_of_its_scheduler():
    scheduler = DDPMScheduler(**ANCESTRAL)
    model = TinyModel(Schedule.from_scheduler(scheduler))
    cond = model.embed(prompts())
    ours = rollout(
        model, cond, chain=8, dynamics=DDPM(), start=Start(latents=start(), generator=torch.Generator().manual_seed(1))
    ).final
    scheduler.set_timesteps(8)
    x, generator = start(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model.predict(x, t.expand(3), cond), t, x, generator=generator).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flow", [False, True])
def test_small_ancestral_variance_is_full_ddim_noise(flow):
    schedule = Schedule.flow() if flow else Schedule.from_scheduler(DDIMScheduler(**SD))
    x_t, pred = draw(2)
    at = (torch.tensor([800, 300]), torch.tensor([700, 120]))
    torch.testing.assert_close(
        transition(schedule, pred, x_t, *at, DDPM()),
        transition(schedule, pred, x_t, *at, DDIM(eta=1.0)),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"shift": 2.0, "shift_terminal": 0.1}])
@pytest.mark.parametrize("dynamics", [FlowODE(), CPS(eta=1.0)])
def test_flow_steps_are_those_of_the_euler_scheduler(options, dynamics):
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=dynamics.stochastic, **options)
    schedule = Schedule.from_scheduler(scheduler)
    scheduler.set_timesteps(6)
    begin, end = schedule.timesteps(6)
    assert begin.tolist() == scheduler.timesteps.tolist()
    for i in range(6):
        x_t, pred, noise = (v.float() for v in draw(3, i))
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(i))
        generator = torch.Generator().manual_seed(i)
        expected = scheduler.step(pred, scheduler.timesteps[i], x_t, generator=generator).prev_sample
        mean, std = transition(schedule, pred, x_t, begin[i].expand(2), end[i].expand(2), dynamics)
        torch.testing.assert_close(mean + std * noise, expected, rtol=0, atol=2e-6)


def test_dynamic_shift_needs_and_follows_mu():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    schedule = Schedule.from_scheduler(scheduler)
    with pytest.raises(UserError, match="give mu"):
        schedule.timesteps(4)
    scheduler.set_timesteps(4, mu=0.8)
    assert schedule.timesteps(4, mu=0.8)[0].tolist() == scheduler.timesteps.tolist()
    with pytest.raises(UserError, match="invert_sigmas"):
        Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


def test_a_shift_keeps_the_ends_and_moves_the_rest_towards_noise():
    begin, end = Schedule.flow(shift=3.0).timesteps(4)
    sigma = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(begin, 1000 * 3 * sigma / (1 + 2 * sigma))
    assert end.tolist() == [*begin[1:].tolist(), 0.0]


@pytest.mark.parametrize("sigma", [0.05, 0.4, 0.9])
def test_flow_sdes_are_the_published_formula(sigma):
    """mu = x (1 + s^2 dt / (2 t)) + v (1 + s^2 (1 - t) / (2 t)) dt, std = s sqrt(-dt)."""
    schedule, (x_t, v) = Schedule.flow(), draw(2)
    t, t_next = torch.tensor([1000 * sigma] * 2, dtype=torch.float64), torch.tensor([800 * sigma] * 2).double()
    dt = -0.2 * sigma
    for dynamics, s in ((FlowSDE(eta=0.7), 0.7 * math.sqrt(sigma / (1 - sigma))), (DanceSDE(eta=0.3), 0.3)):
        mean, std = transition(schedule, v, x_t, t, t_next, dynamics)
        expected = x_t * (1 + s**2 * dt / (2 * sigma)) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(std.flatten(), torch.full((2,), s * math.sqrt(-dt), dtype=torch.float64))


def test_flow_sde_starts_finitely_at_pure_noise():
    """At sigma = 1 the paper's s takes 1 - sigma at the end of the step."""
    t, t_next = torch.tensor([1000.0]), torch.tensor([900.0])
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    _, std = transition(Schedule.flow(), x, x, t, t_next, FlowSDE(eta=0.5))
    torch.testing.assert_close(float(std), 0.5 * math.sqrt(1 / 0.1) * math.sqrt(0.1))


@pytest.mark.parametrize("dynamics", [FlowSDE(eta=0.0), DanceSDE(eta=0.0), CPS(eta=0.0), DDIM()])
def test_without_noise_all_are_the_ode(dynamics):
    x_t, v = draw(2)
    at = (torch.tensor([800.0, 300.0]), torch.tensor([650.0, 0.0]))
    assert not dynamics.stochastic
    torch.testing.assert_close(
        transition(Schedule.flow(), v, x_t, *at, dynamics),
        transition(Schedule.flow(), v, x_t, *at, FlowODE()),
        rtol=1e-12,
        atol=1e-12,
    )


def gaussian_end(dynamics, steps: int, mean: float = 0.5, deviation: float = 0.3) -> tuple[float, float]:
    """Mean and deviation that a chain reaches for data N(mean, deviation^2), whose best velocity is affine in x.

    Every step is then an affine map and fresh noise, so both follow exactly: nothing is drawn.
    """
    schedule = Schedule.flow()
    m, variance = 0.0, 1.0
    for t, t_next in zip(*(v.double() for v in schedule.timesteps(steps)), strict=True):
        alpha, sigma = schedule.levels(t[None], 4)
        x = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
        spread = (alpha * deviation) ** 2 + sigma**2
        x_0 = mean + alpha * deviation**2 / spread * (x - alpha * mean)
        moved, std = transition(schedule, (x - x_0) / sigma, x, t.expand(2), t_next.expand(2), dynamics)
        at_0, at_1 = moved.flatten().tolist()
        m, variance = at_0 + (at_1 - at_0) * m, (at_1 - at_0) ** 2 * variance + float(std[0]) ** 2
    return m, math.sqrt(variance)


@pytest.mark.parametrize(
    "dynamics", [FlowODE(), FlowSDE(eta=0.7), DanceSDE(eta=0.3), DDIM(eta=0.5), DDPM()], ids=lambda d: d.name
)
def test_a_gaussian_is_sampled_in_the_limit_of_short_steps(dynamics):
    errors = []
    for steps in (50, 1000):
        m, deviation = gaussian_end(dynamics, steps)
        errors.append(abs(m - 0.5) + abs(deviation - 0.3))
    assert errors[1] < 4e-3
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("eta", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("flow", [False, True])
def test_cps_noise_adds_up_to_that_of_the_schedule(eta, flow):
    schedule = Schedule.flow() if flow else Schedule.from_scheduler(DDIMScheduler(**SD))
    zero, one = torch.zeros(2, 1, 1, 1, dtype=torch.float64), torch.ones(2, 1, 1, 1, dtype=torch.float64)
    t, t_next = torch.tensor([800, 300]), torch.tensor([700, 120])
    of_eps, std = transition(
        schedule, schedule.target(zero, one, t), schedule.add_noise(zero, one, t), t, t_next, CPS(eta=eta)
    )
    of_x_0, _ = transition(
        schedule, schedule.target(one, zero, t), schedule.add_noise(one, zero, t), t, t_next, CPS(eta=eta)
    )
    alpha, sigma = schedule.levels(t_next, 4)
    torch.testing.assert_close(of_x_0, alpha, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((of_eps**2 + std**2).sqrt(), sigma, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std, math.sin(eta * math.pi / 2) * sigma, rtol=1e-12, atol=1e-12)


def test_recipes_name_dynamics():
    assert make_dynamics("ddim") == DDIM()
    assert make_dynamics({"name": "flow-sde", "eta": "0.5"}) == FlowSDE(eta=0.5)
    assert make_dynamics({"name": "ddpm", "variance": "fixed_large"}) == DDPM(variance="fixed_large")
    assert make_dynamics(CPS()) == CPS(eta=0.7)
    with pytest.raises(UserError, match=r"objective.dynamics.name: 'flow_sde' is not a dynamics; did you mean 'flow"):
        make_dynamics("flow_sde", "objective.dynamics")
    with pytest.raises(UserError, match=r"dynamics.etta is not an option of .*; did you mean 'eta'"):
        make_dynamics({"name": "ddim", "etta": 1})
    with pytest.raises(UserError, match="eta must be a number from 0 to 10, not -1"):
        make_dynamics({"name": "dance-sde", "eta": -1})
    with pytest.raises(UserError, match=r"eta must be a number from 0 to 1, not 1\.5"):
        make_dynamics({"name": "cps", "eta": 1.5})


@pytest.mark.parametrize("dynamics", [FlowODE(), FlowSDE(), DanceSDE()], ids=lambda d: d.name)
def test_flow_dynamics_refuse_other_models_before_they_run(dynamics):
    model = TinyModel()
    with pytest.raises(UserError, match=f"'{dynamics.name}' is for flow models and this one predicts eps: use ddim"):
        rollout(model, model.embed(prompts()), dynamics=dynamics)
    assert model.calls == 0
