from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_online import Gaussian, batch_of, policy_trainer, shifted_reference, tools_of
from tiny_training import TinyModel

from visiontune import adapters
from visiontune.diffusion.dynamics import make_dynamics
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Start, Window, rollout
from visiontune.diffusion.transition import gaussian_kl, transition
from visiontune.errors import UserError
from visiontune.objectives import grpo
from visiontune.schema import from_mapping

SDE = ("flow-sde", "dance-sde", "cps")


def objective(**options):
    return grpo.build(
        from_mapping(grpo.Config, {"steps": 5, "cfg_scale": 1.0, "dynamics": "flow-sde", "group": 4} | options)
    )


@pytest.mark.parametrize("dynamics", SDE)
def test_the_gradient_is_that_of_the_expected_reward(dynamics):
    """Likelihood ratios against the gradient through the sampler, both over many pictures.

    The last step of cps adds no noise and so has no likelihood: what the weights do there is left out on both sides.
    """
    model, count = Gaussian(), 6000
    built = objective(dynamics=dynamics, group=count, last_step=True)
    tools = tools_of()
    rollouts = built.collect(model, batch_of(count, 1), tools)
    built.update(model, rollouts, 0, tools)
    (chunk,) = rollouts.pieces[0]
    scored = int(chunk.trajectory.scored.sum())
    # By the mean over four latent values and the steps, in deviations of the reward.
    found = -float(model.mean.grad) * 4 * scored * float(rollouts.terms["reward_std"])

    model.mean.grad = None
    cond, (start, end), steps = model.embed([""] * count), model.schedule.timesteps(5), make_dynamics(dynamics)
    through = rollout(
        model,
        cond,
        chain=(start[:scored], end[:scored]),
        dynamics=steps,
        window=Window(steps=scored),
        start=Start(generator=torch.Generator().manual_seed(1)),
    )
    x, frozen = through.final, copy.deepcopy(model).requires_grad_(False)
    for t, t_next in zip(start[scored:, None], end[scored:, None], strict=True):
        x, _ = transition(model.schedule, frozen.predict(x, t, cond), x, t, t_next, steps)
    (model.decode(x) / 2 + 0.5).mean().backward()
    assert scored == (4 if dynamics == "cps" else 5)
    assert found == pytest.approx(float(model.mean.grad), rel=0.15)


@pytest.mark.parametrize("dynamics", SDE)
def test_pictures_of_a_group_start_from_the_same_noise_if_asked(dynamics):
    model = Gaussian()
    for same in (False, True):
        rollouts = objective(dynamics=dynamics, same_noise=same).collect(model, batch_of(4, 2), tools_of())
        trajectory = rollouts.pieces[0][0].trajectory
        start, end = (trajectory.latents[:, i].view(2, 4, -1) for i in (0, -1))
        assert torch.equal(start, start[:, :1].expand_as(start)) is same
        assert not torch.equal(start[0, 0], start[1, 0])
        assert not torch.equal(end, end[:, :1].expand_as(end))


def test_the_best_and_the_worst_of_a_larger_group():
    model, batch = Gaussian(), batch_of(6, 2)
    whole = objective(group=6).collect(model, batch, tools_of())
    built, tools = objective(group=6, best_of=2, micro_batch=5), tools_of()
    rollouts = built.collect(model, batch, tools)
    every = whole.pieces[0][0].advantages.view(2, 6)
    expected = {*(every.argmax(1) + torch.tensor([0, 6])).tolist(), *(every.argmin(1) + torch.tensor([0, 6])).tolist()}
    assert {int(r) for chunk in rollouts.pieces[0] for r in chunk.batch.data["row"]} == expected
    assert rollouts.rows == 4
    # Drawn in fives, then scored again in the batch in which they are replayed.
    assert model.calls[-15:] == [5] * 5 + [2] * 5 + [4] * 5
    model.calls.clear()
    seen = []
    built.require_ratio_one = lambda drift, t: seen.append(drift)
    built.update(model, rollouts, 0, tools)
    assert model.calls == [4] * 4
    assert all(not drift.any() for drift in seen)


def test_the_last_step_is_trained_on_only_if_asked():
    model, tools = Gaussian(), tools_of()
    for last in (False, True):
        built = objective(last_step=last)
        (chunk,) = built.collect(model, batch_of(4, 1), tools).pieces[0]
        assert built.timesteps(chunk, 0, tools)[0].tolist() == list(range(5 if last else 4))


def test_the_divergence_is_zero_at_the_base_and_pulls_back_to_it():
    model = Gaussian()
    batch = batch_of(4, 2)
    built = objective(beta=1e6)
    tools = tools_of(reference=shifted_reference(model.mean, 0.0))
    loss = built.update(model, built.collect(model, batch, tools), 0, tools)
    assert loss.terms["kl"] == 0
    for value in (0.5, -0.5):
        with torch.no_grad():
            model.mean.fill_(value)
        model.mean.grad = None
        loss = built.update(model, built.collect(model, batch, tools), 0, tools)
        assert loss.terms["kl"] > 0 and float(model.mean.grad) * value > 0


@pytest.mark.parametrize("dynamics", SDE)
def test_the_reward_rises(dynamics):
    model = Gaussian()
    built = objective(dynamics=dynamics, group=16, same_noise=True, timestep_fraction=0.75, updates=2)
    optimizer, rewards = torch.optim.Adam([model.mean], lr=0.05), []
    for index in range(12):
        tools = tools_of(index=index)
        rollouts = built.collect(model, batch_of(16, 4), tools)
        for part in range(2):
            optimizer.zero_grad()
            loss = built.update(model, rollouts, part, tools)
            optimizer.step()
        rewards.append(float(loss.terms["reward"]))
    assert model.mean > 0.4 and sum(rewards[-3:]) > sum(rewards[:3]) + 0.2


@pytest.mark.parametrize("method", ["lora", "oft"])
def test_a_run_with_an_adapter_compares_with_the_model_without_it(tmp_path, method):
    model = TinyModel()
    torch.manual_seed(0)
    options = {"block_size": 4} if method == "oft" else {"rank": 2}
    found = adapters.attach({"unet": model.denoiser}, method, targets=["first", "time"], **options)
    built = objective(dynamics={"name": "ddim", "eta": 1.0}, cfg_scale=2.0, beta=0.1, micro_batch=4)
    policy_trainer(tmp_path, built, model=model, adapters=found, steps=3, lr=1e-2).fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert abs(rows[0]["kl"]) < 1e-6 and rows[-1]["kl"] > 10 * abs(rows[0]["kl"])
    assert {"clip_fraction", "flat_prompts", "reward_std", "advantage"} <= rows[0].keys()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"group": 1}, "group must be a whole number from 2"), ({"best_of": 5}, "best_of"), ({"beta": -0.1}, "beta")],
)
def test_wrong_options_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        objective(**wrong)


@pytest.mark.parametrize(("shift", "weakest", "strongest"), [(1.0, 10.0, 10.0), (3.0, 4.0, 28.0)])
def test_the_divergence_is_that_of_flow_grpos_code_over_the_length_of_the_step(shift, weakest, strongest):
    """As the page of the objective says, which gives a beta by it."""
    schedule = Schedule.flow(shift=shift)
    t, t_next = schedule.timesteps(10)
    sigma, sigma_next = (schedule.levels(when, 1)[1] for when in (t, t_next))
    alpha = torch.where(sigma < 1, 1 - sigma, 1 - sigma_next)
    without_length = 0.7**2 * sigma / alpha
    mean, std = transition(schedule, torch.ones(10, 2), torch.zeros(10, 2), t, t_next, make_dynamics("flow-sde"))
    base, _ = transition(schedule, torch.zeros(10, 2), torch.zeros(10, 2), t, t_next, make_dynamics("flow-sde"))
    theirs = (mean - base).square().mean(1) / (2 * without_length)
    ratio = gaussian_kl(mean, base, std) / theirs
    torch.testing.assert_close(ratio.double(), 1 / (sigma - sigma_next), rtol=1e-4, atol=0)
    assert (float(ratio.min()), float(ratio[:-1].max())) == pytest.approx((weakest, strongest), rel=1e-3)
