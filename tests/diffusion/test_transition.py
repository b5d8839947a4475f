"""Transitions: equal to DDIMScheduler.step, and true to the marginals of the forward process."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from visiontune.diffusion.dynamics import DDIM, FlowSDE
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.transition import gaussian_kl, kernel, log_prob, transition

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


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_log_prob_is_that_of_a_normal_distribution(reduce):
    x, mean = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    each = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).flatten(1)
    expected = each.sum(1) if reduce == "sum" else each.mean(1)
    torch.testing.assert_close(log_prob(x, mean, std, reduce), expected, rtol=1e-12, atol=0)
    low = log_prob(x.bfloat16(), mean.bfloat16(), std.bfloat16(), reduce)
    assert low.dtype == torch.float32
    again = log_prob(x.bfloat16().float(), mean.bfloat16().float(), std.bfloat16().float(), reduce)
    assert torch.equal(low, again)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gaussian_kl_is_exact_with_its_gradient_and_starts_at_zero(reduce):
    mean, other = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    mean.requires_grad_()

    def reference() -> torch.Tensor:
        wide = std.expand_as(mean)
        normal = torch.distributions.Normal
        each = torch.distributions.kl_divergence(normal(mean, wide), normal(other, wide)).flatten(1)
        return each.sum(1) if reduce == "sum" else each.mean(1)

    ours = gaussian_kl(mean, other, std, reduce)
    torch.testing.assert_close(ours, reference(), rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value.sum(), mean)[0] for value in (ours, reference())]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
    start = gaussian_kl(mean, mean.detach(), std, reduce)
    assert torch.equal(start, torch.zeros(3, dtype=torch.float64))
    assert not torch.autograd.grad(start.sum(), mean)[0].any()


def test_flow_kl_of_a_step_is_the_published_one():
    """|dt| / 2 (s (1 - t) / (2 t) + 1 / s)^2 |v - v_ref|^2, Flow-GRPO, with the factor |dt|."""
    schedule, sigma, dt = Schedule.flow(), 0.6, 0.1
    x, v, v_ref = torch.randn(3, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, t_next = torch.tensor([600]), torch.tensor([500])
    s = 0.7 * (sigma / (1 - sigma)) ** 0.5
    mean, std = transition(schedule, v, x, t, t_next, FlowSDE(eta=0.7))
    mean_ref, _ = transition(schedule, v_ref, x, t, t_next, FlowSDE(eta=0.7))
    factor = dt / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2
    torch.testing.assert_close(
        gaussian_kl(mean, mean_ref, std, "sum"), factor * (v - v_ref).square().sum()[None], rtol=1e-10, atol=0
    )


def test_a_step_without_noise_has_no_density():
    x = torch.zeros(2, 1, 2, 2)
    for of in (log_prob, gaussian_kl):
        with pytest.raises(ValueError, match="without noise has no"):
            of(x, x, torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_step_to_the_same_level_is_exactly_the_identity(prediction):
    schedule = Schedule.from_scheduler(DDIMScheduler(prediction_type=prediction, set_alpha_to_one=False, **SD))
    of_x, of_pred, std = kernel(schedule, torch.tensor([0]), torch.tensor([-200]), DDIM(eta=1.0))
    assert (of_x, of_pred, std) == (1, 0, 0)
