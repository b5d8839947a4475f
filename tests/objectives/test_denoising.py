from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_training import PREDICTIONS, TinyModel, tiny_batch

from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.timesteps import Timesteps
from visiontune.errors import UserError
from visiontune.objectives import denoising
from visiontune.objectives.base import Tools, combine, generator, mean_where, per_row
from visiontune.objectives.denoising import Config, build, min_snr_weight
from visiontune.schema import from_mapping


def reference_errors(model, batch, seed, prediction, gamma=None):
    """The same draws through diffusers' own scheduler, one row at a time."""
    rng = generator(seed)
    t = (torch.rand(len(batch), generator=rng, dtype=torch.float64) * 1000).long()
    eps = torch.randn(batch.data["image"].shape, generator=rng)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    errors = []
    for i in range(len(batch)):
        x_0, e, s = batch.data["image"][i : i + 1], eps[i : i + 1], t[i : i + 1]
        target = {"eps": e, "x0": x_0, "v": scheduler.get_velocity(x_0, e, s)}[prediction]
        pred = model.predict(scheduler.add_noise(x_0, e, s), s, batch.cond[i])
        abar = scheduler.alphas_cumprod[s]
        snr = float(abar / (1 - abar))
        weight = 1.0
        if gamma is not None:
            weight = {"eps": min(snr, gamma) / snr, "v": min(snr, gamma) / (snr + 1), "x0": min(snr, gamma)}[prediction]
        errors.append(weight * float((pred - target).square().mean()))
    return torch.tensor(errors)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_errors_are_those_of_the_diffusers_scheduler(prediction, gamma):
    model = TinyModel(prediction)
    batch = tiny_batch(model, 3, instance=6)
    errors = build(Config(snr_gamma=gamma)).errors(model, batch, Tools(rng=generator(11)))
    torch.testing.assert_close(errors, reference_errors(model, batch, 11, prediction, gamma), rtol=1e-4, atol=1e-6)


def test_min_snr_of_eps_leaves_noisy_timesteps_alone():
    snr = torch.tensor([0.0, 1e-6, 1.0, 5.0, 10.0, 50.0])
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "eps"), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.1]))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_same_error_alike_in_every_prediction(gamma):
    """One network, read as eps, v or x_0: the weighted losses are one number."""
    t = torch.tensor([5, 200, 500, 800, 995])
    x_0, eps, wrong = (torch.randn(5, 4, 8, 8, generator=generator(i), dtype=torch.float64) for i in range(3))
    losses = []
    for prediction in PREDICTIONS:
        schedule = TinyModel(prediction).schedule
        x_t = schedule.add_noise(x_0, eps, t)
        # A guess of x_0 turned into this network's prediction: the target it would have if the guess were the truth.
        guess = x_0 + 0.1 * wrong
        guessed_eps = TinyModel("x0").schedule.to_eps(guess, x_t, t)
        pred = schedule.target(guess, guessed_eps, t)
        error = (pred - schedule.target(x_0, eps, t)).square().flatten(1).mean(1)
        losses.append(error * min_snr_weight(schedule.snr(t).double(), gamma, prediction))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-5, atol=0)


def test_min_snr_weighs_the_error_of_a_flow_by_that_of_its_clean_picture():
    schedule = Schedule.flow()
    t = torch.tensor([10.0, 250, 500, 900, 1000])
    x_0, eps, wrong = (torch.randn(5, 4, 8, 8, generator=generator(i), dtype=torch.float64) for i in range(3))
    x_t = schedule.add_noise(x_0, eps, t)
    pred = schedule.target(x_0, eps, t) + wrong
    clean = (schedule.to_x_0(pred, x_t, t) - x_0).square().flatten(1).mean(1)
    snr = schedule.snr(t).double()
    found = min_snr_weight(snr, 5.0, "flow") * wrong.square().flatten(1).mean(1)
    torch.testing.assert_close(found, snr.clamp(max=5) * clean, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 0.1, 0.5])
def test_offset_noise_moves_the_channel_means(offset):
    eps = build(Config(offset_noise=offset)).noise(torch.zeros(3000, 4, 8, 8), generator(0))
    assert eps.mean((2, 3)).var().item() == pytest.approx(offset**2 + 1 / 64, rel=0.06)
    assert (eps - eps.mean((2, 3), keepdim=True)).var().item() == pytest.approx(1 - 1 / 64, rel=0.02)


def test_the_target_holds_the_offset_noise():
    """A network that returns the very noise that was added has no error, offset or not."""
    model = TinyModel()
    batch = replace(tiny_batch(model, 0, instance=4), data={"image": torch.zeros(4, 4, 8, 8)})
    model.predict = lambda x_t, t, cond: x_t / model.schedule.sigma(t)[:, None, None, None]
    errors = build(Config(offset_noise=0.5)).errors(model, batch, Tools(rng=generator(0)))
    torch.testing.assert_close(errors, torch.zeros(4), atol=1e-9, rtol=0)


@pytest.mark.parametrize("options", [{"snr_gamma": 0.0}, {"offset_noise": -0.1}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        from_mapping(Config, options)


def test_options_of_the_first_version_name_those_of_now():
    with pytest.raises(UserError, match=r"objective\.min_timestep is now objective\.timesteps\.low"):
        from_mapping(Config, {"min_timestep": 200}, "objective")
    assert from_mapping(Config, {"timesteps": {"low": 0.2}}).timesteps == Timesteps(low=0.2)
    assert from_mapping(Config, {"timesteps": "logit_normal"}).timesteps == Timesteps(density="logit_normal")


def test_timesteps_are_drawn_as_the_option_says():
    model = TinyModel()
    objective = build(Config(timesteps=Timesteps(low=0.1, high=0.104)))
    t, _ = objective.noised(model, torch.zeros(400, 4, 8, 8), tiny_batch(model, 0, 400), Tools(rng=generator(0)))
    assert t.unique().tolist() == [100, 101, 102, 103]


def test_a_mask_counts_the_errors_inside_it_alone():
    model = TinyModel()
    batch = tiny_batch(model, 0, instance=2)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :2], mask[1, :, 3:] = 1.0, 0.5
    objective = build(Config())
    masked = replace(batch, data={**batch.data, "mask": mask})
    x_0 = batch.data["image"]
    t, eps = objective.noised(model, x_0, batch, Tools(rng=generator(4)))
    x_t, target = model.schedule.add_noise(x_0, eps, t), model.schedule.target(x_0, eps, t)
    errors = objective.error_map(model, x_t, t, batch.cond, target)
    found = objective.errors(model, masked, Tools(rng=generator(4)))
    torch.testing.assert_close(found, torch.stack([errors[0, :, :2].mean(), errors[1, :, 3:].mean()]))
    torch.testing.assert_close(objective.errors(model, batch, Tools(rng=generator(4))), errors.mean((1, 2, 3)))
    assert per_row(errors, torch.zeros(2, 1, 8, 8)).tolist() == [0, 0]


def test_a_generator_is_a_function_of_its_key():
    assert torch.equal(torch.randn(3, generator=generator(1, "a")), torch.randn(3, generator=generator(1, "a")))
    assert generator(1, "a").initial_seed() != generator(1, "b").initial_seed() != generator(2, "b").initial_seed()


def test_a_row_weight_scales_its_own_row():
    model = TinyModel()
    objective, batch = build(Config()), tiny_batch(TinyModel(), 0, instance=4)
    errors = objective.errors(model, batch, Tools(rng=generator(5)))
    for row in range(4):
        weight = torch.ones(4)
        weight[row] = 3.0
        total = objective.loss(model, replace(batch, weight=weight), Tools(rng=generator(5))).total
        torch.testing.assert_close(total, errors.mean() + 2 * errors[row] / 4)


def test_errors_of_another_length_than_the_weights_do_not_broadcast():
    batch = tiny_batch(TinyModel(), 0, instance=1, prior=1)
    with pytest.raises(ValueError, match="must agree"):
        combine(torch.ones(1), batch)


def test_mean_where_of_nothing_is_zero_with_a_gradient():
    values = torch.ones(3, requires_grad=True)
    mean = mean_where(values, torch.zeros(3, dtype=torch.bool))
    mean.backward()
    assert mean == 0 and torch.equal(values.grad, torch.zeros(3))


def test_training_the_text_encoder_reaches_its_weights():
    model = TinyModel()
    model.encoder.requires_grad_(True)
    batch = tiny_batch(model, 0, instance=2, embedded=False)
    build(Config()).loss(model, batch, Tools(rng=generator(0))).total.backward()
    assert model.encoder.weight.grad.abs().sum() > 0


def test_bf16_predictions_are_compared_in_float32():
    model = TinyModel()
    predict = model.predict
    model.predict = lambda x_t, t, cond: predict(x_t, t, cond).bfloat16()
    assert (
        denoising.build(Config()).errors(model, tiny_batch(model, 0, 2), Tools(rng=generator(0))).dtype == torch.float32
    )
