"""Transitions: equal to DDIMScheduler.step, and true to the marginals of the forward process."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.transition import DDIM, transition

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
VARIANTS = {
    "sd": {"set_alpha_to_one": False, "steps_offset": 1},
    "to-one": {"set_alpha_to_one": True, "steps_offset": 0},
    "linspace": {"set_alpha_to_one": True, "timestep_spacing": "linspace"},
    "trailing": {"set_alpha_to_one": False, "timestep_spacing": "trailing"},
    "zero-snr": {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
}


CASES = [
    (variant, prediction, eta)
    for variant in VARIANTS
    for prediction in ("epsilon", "v_prediction", "sample")
    for eta in (0.0, 0.5, 1.0)
    # Where alpha is 0, eps says nothing about x_0; and there the reference is NaN for eta 1, by rounding below a root.
    if variant != "zero-snr" or (prediction != "epsilon" and eta < 1)
]


@pytest.mark.parametrize(("variant", "prediction", "eta"), CASES)
def test_transition_is_a_step_of_ddim(variant, prediction, eta):
    scheduler = DDIMScheduler(prediction_type=prediction, **SD, **VARIANTS[variant])
    schedule = Schedule.from_scheduler(scheduler)
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(0)
    start, end = schedule.timesteps(7)
    assert start.tolist() == scheduler.timesteps.tolist()
    for t, t_next in zip(start, end, strict=True):
        x_t, pred, eps = torch.randn(3, 2, 4, 8, 8, generator=generator)
        expected = scheduler.step(pred, int(t), x_t, eta=eta, variance_noise=eps if eta else None).prev_sample
        mean, std = transition(schedule, pred, x_t, t.expand(2), t_next.expand(2), DDIM(eta=eta))
        assert mean.dtype == std.dtype == torch.float32
        assert std.shape == (2, 1, 1, 1)
        # the reference takes differences of alphas in float32, so it is itself no better than about 1e-5
        torch.testing.assert_close(mean + std * eps, expected, rtol=1e-5, atol=2e-5)


def test_zero_terminal_snr_stays_finite_with_full_noise():
    schedule = Schedule.from_scheduler(DDIMScheduler(prediction_type="v_prediction", **SD, **VARIANTS["zero-snr"]))
    x_t, pred = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, t_next = torch.tensor([999]), torch.tensor([857])
    assert schedule.alpha(t) == 0
    mean, std = transition(schedule, pred, x_t, t, t_next, DDIM(eta=1.0))
    torch.testing.assert_close(mean, schedule.alpha(t_next) * -pred)
    torch.testing.assert_close(std.flatten(), schedule.sigma(t_next))


def test_rows_may_stand_at_different_timesteps():
    schedule = Schedule.from_scheduler(DDIMScheduler(**SD))
    x_t, pred = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, t_next = torch.tensor([900, 500, 20]), torch.tensor([700, 100, -1])
    mean, std = transition(schedule, pred, x_t, t, t_next, DDIM(eta=0.8))
    for row in range(3):
        one = slice(row, row + 1)
        alone = transition(schedule, pred[one], x_t[one], t[one], t_next[one], DDIM(eta=0.8))
        torch.testing.assert_close((mean[one], std[one]), alone)
    assert std[0] > 0
    assert std[2] == 0


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_an_exact_step_lands_on_the_marginal_of_the_next_timestep(prediction, eta):
    """With the exact prediction, x_next has mean alpha' x_0 and deviation sigma', whatever eta is."""
    schedule = Schedule.flow() if prediction == "flow" else Schedule.from_scheduler(DDIMScheduler(**SD))
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.full((1, 1, 400, 500), 1.5, dtype=torch.float64)
    eps, fresh = torch.randn(2, *x_0.shape, generator=generator, dtype=torch.float64)
    t, t_next = torch.tensor([700]), torch.tensor([400])
    x_t = schedule.add_noise(x_0, eps, t)
    mean, std = transition(schedule, schedule.target(x_0, eps, t), x_t, t, t_next, DDIM(eta=eta))
    x_next = mean + std * fresh
    assert abs(x_next.mean() - 1.5 * schedule.alpha(t_next)) < 0.005
    assert abs(x_next.std() - schedule.sigma(t_next)) < 0.005
    assert (std > 0) == (eta > 0)


def test_eta_one_has_the_posterior_variance_of_ddpm():
    scheduler = DDIMScheduler(**SD)
    schedule = Schedule.from_scheduler(scheduler)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    _, std = transition(schedule, x, x, torch.tensor([500]), torch.tensor([499]), DDIM(eta=1.0))
    alphas = scheduler.alphas_cumprod.double()
    beta = 1 - alphas[500] / alphas[499]
    torch.testing.assert_close(std.squeeze().square(), (1 - alphas[499]) / (1 - alphas[500]) * beta)


def test_a_deterministic_flow_step_is_eulers():
    schedule = Schedule.flow()
    x_t, pred = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = transition(schedule, pred, x_t, torch.tensor([700]), torch.tensor([450]))
    torch.testing.assert_close(mean, x_t + (0.45 - 0.7) * pred)
    assert std == 0


def test_negative_eta_is_refused():
    with pytest.raises(ValueError, match="eta must not be negative"):
        DDIM(eta=-0.1)
