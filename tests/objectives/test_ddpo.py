from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from tiny_online import Gaussian, batch_of, policy_trainer, shifted_reference, tools_of
from tiny_training import PREDICTIONS, TinyModel

from visiontune.diffusion.replay import replay
from visiontune.diffusion.schedule import Schedule
from visiontune.errors import UserError
from visiontune.objectives import ddpo
from visiontune.objectives._advantages import tracked_advantages
from visiontune.schema import from_mapping
from visiontune.training import checkpoint


def objective(**options):
    return ddpo.build(
        from_mapping(ddpo.Config, {"steps": 4, "cfg_scale": 1.0, "dynamics": "flow-sde", "group": 2} | options)
    )


def test_the_log_ratio_with_the_base_is_taken_off_the_advantage():
    model = Gaussian()
    tools = tools_of(reference=shifted_reference(model.mean, 0.4))
    batch = batch_of(4, 2)
    plain = objective(group=4, advantage_clip=100.0).collect(model, batch, tools)
    built = objective(group=4, advantage_clip=100.0, kl_penalty=0.2, micro_batch=3)
    tools = tools_of(reference=tools.reference)
    found = built.collect(model, batch, tools)
    (whole,) = plain.pieces[0]
    now = replay(model, whole.trajectory).detach()
    with tools.reference():
        base = replay(model, whole.trajectory).detach()
    ratio = (now - base).mean(1).double()
    expected = whole.advantages - 0.2 * tracked_advantages(ratio, batch.data["prompt"], {}, 32, 16)
    advantages = torch.cat([chunk.advantages for chunk in found.pieces[0]])
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-5)
    assert (advantages - whole.advantages).abs().max() > 0.05
    assert float(found.terms["kl"]) == pytest.approx(float(ratio.mean()), rel=1e-4)
    assert set(tools.state) == {"reward", "kl"}


def test_the_penalty_is_nothing_where_the_model_is_the_base():
    model = Gaussian()
    tools = tools_of(reference=shifted_reference(model.mean, 0.0))
    found = objective(kl_penalty=5.0).collect(model, batch_of(2, 3), tools)
    plain = objective().collect(model, batch_of(2, 3), tools_of())
    assert found.terms["kl"] == 0
    assert torch.equal(found.pieces[0][0].advantages, plain.pieces[0][0].advantages)


def test_without_a_tracker_the_rollout_is_the_yardstick():
    model, tools = Gaussian(), tools_of()
    (chunk,) = objective(tracker=0).collect(model, batch_of(2, 4), tools).pieces[0]
    assert not tools.state
    assert float(chunk.advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(chunk.advantages.std(unbiased=False)) == pytest.approx(1, rel=1e-6)


def test_a_step_without_noise_is_left_out():
    model = TinyModel()
    model.denoiser.requires_grad_(True)
    model.schedule = Schedule.from_scheduler(
        DDIMScheduler(set_alpha_to_one=True, clip_sample=False, prediction_type=PREDICTIONS["eps"])
    )
    built, tools = objective(dynamics={"name": "ddim", "eta": 1.0}), tools_of()
    rollouts = built.collect(model, batch_of(2, 2), tools)
    steps = built.timesteps(rollouts.pieces[0][0], 0, tools)
    assert steps[0].tolist() == [0, 1, 2]
    assert torch.isfinite(built.update(model, rollouts, 0, tools).total)


def final(trainer):
    return load_file(trainer.fit() / "weights.safetensors")


def test_the_rewards_seen_survive_a_resume(tmp_path):
    options = {"lr": 1e-2, "steps": 4, "checkpoint_every": 2, "resume": True}

    def build():
        return objective(dynamics={"name": "ddim", "eta": 1.0}, tracker=8, min_count=4, updates=2)

    whole = final(policy_trainer(tmp_path / "whole", build(), **options))
    policy_trainer(tmp_path / "broken", build(), **options | {"steps": 2}).fit()
    broken = final(policy_trainer(tmp_path / "broken", build(), **options))
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
    states = [
        checkpoint.load(checkpoint.latest(tmp_path / run))[1]["parts"]["objective"] for run in ("whole", "broken")
    ]
    assert states[0] == states[1] and sum(map(len, states[0]["reward"].values())) == 16
    # Two rollouts of eight rows over three prompts: some prompt has been seen in both.
    assert max(map(len, states[0]["reward"].values())) > 4


def test_the_reward_rises(tmp_path):
    model = Gaussian()
    built = objective(steps=8, group=32)
    optimizer, rewards = torch.optim.Adam([model.mean], lr=0.05), []
    for index in range(20):
        tools = tools_of(index=index)
        rollouts = built.collect(model, batch_of(32, 2), tools)
        optimizer.zero_grad()
        rewards.append(float(built.update(model, rollouts, 0, tools).terms["reward"]))
        optimizer.step()
    assert model.mean > 0.5 and sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_count": 40}, "min_count must be at most tracker"),
        ({"kl_penalty": -1.0}, "kl_penalty"),
        ({"timestep_fraction": 0.0}, "timestep_fraction"),
        ({"updates": 0}, "updates must be a whole number from 1"),
        ({"clip": 0.0}, "clip"),
        ({"micro_batch": 0}, "micro_batch"),
    ],
)
def test_wrong_options_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        objective(**wrong)


def test_without_an_adapter_a_penalty_compares_with_the_weights_of_the_start(tmp_path):
    built = objective(dynamics={"name": "ddim", "eta": 1.0}, kl_penalty=0.1)
    trainer = policy_trainer(tmp_path, built, lr=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.fit()
    after = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    with trainer.lender.tools(0).reference():
        assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())
    assert all(torch.equal(p, after[name]) for name, p in trainer.parameters.items())
