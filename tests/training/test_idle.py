"""Runs that begin without any gradient train nothing, and say why; others are let be."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_online import policy_trainer
from tiny_training import RowNoise, TinyModel, interrupt, tiny_trainer

from visiontune.adapters import attach, lora
from visiontune.core import Loss
from visiontune.errors import UserError
from visiontune.objectives import alignprop, ddpo, dpo_online, grpo

SHORT = {"steps": 3, "cfg_scale": 1.0}


def adapted(**options):
    model = TinyModel()
    return {"model": model, "adapters": attach(model.of("unet"), lora.Config(rank=2, **options), targets=["Conv2d"])}


def online(folder, objective, reward, **train):
    return policy_trainer(folder, objective, reward=reward, **adapted(), **train)


def rounded(images, prompts, meta=None):
    return (images.mean((1, 2, 3)) * 1000).round() / 1000


rounded.differentiable = True


def equal(images, prompts, meta=None):
    return torch.full((len(images),), 0.25)


def differing(images, prompts, meta=None):
    return images.mean((1, 2, 3))


def test_an_adapter_of_no_strength_is_named(tmp_path):
    with pytest.raises(UserError, match=r"exactly 0 in all of the first 5 steps, since adapter\.alpha=0 multiplies"):
        tiny_trainer(tmp_path, **adapted(alpha=0.0), steps=9).fit()
    assert not (tmp_path / "adapter.safetensors").exists()


def test_a_run_of_fewer_steps_does_not_finish_either(tmp_path):
    with pytest.raises(UserError, match="in all of the first 2 steps"):
        tiny_trainer(tmp_path, **adapted(alpha=0.0), steps=2).fit()


def test_a_reward_that_rounds_is_named(tmp_path):
    with pytest.raises(UserError, match="the gradient of reward 'toy' is 0 at every picture: it rounds"):
        online(tmp_path, alignprop.build(alignprop.Config(**SHORT)), rounded, steps=6).fit()


@pytest.mark.parametrize("kind", [ddpo, grpo, dpo_online])
def test_equal_rewards_are_said_at_the_first_rollout_and_stop_the_run(tmp_path, caplog, kind):
    noisy = {} if kind is dpo_online else {"dynamics": {"name": "ddim", "eta": 1.0}}
    objective = kind.build(kind.Config(**SHORT, **noisy, group=4, updates=2))
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="in all of the first 10 steps") as error:
        online(tmp_path, objective, equal, steps=20, checkpoint_every=20).fit()
    said = "the pictures of each prompt have equal rewards ('toy', 0.25 in the mean)"
    assert said in str(error.value)
    assert [said in record.message for record in caplog.records if "first rollout" in record.message] == [True]


def test_a_picture_that_is_compared_with_itself_is_named(tmp_path):
    objective = ddpo.build(ddpo.Config(**SHORT))
    with pytest.raises(UserError, match=r"compared with none but itself: raise train\.batch_size"):
        online(tmp_path, objective, differing, batch_size=1, steps=6).fit()


def test_rewards_that_come_to_differ_in_time_are_waited_for(tmp_path):
    calls = []

    def rare(images, prompts, meta=None):
        calls.append(1)
        return differing(images, prompts) if len(calls) > 4 else equal(images, prompts)

    objective = grpo.build(grpo.Config(**SHORT, group=4))
    online(tmp_path, objective, rare, steps=9, checkpoint_every=9).fit()


class Masked(RowNoise):
    """The first batch counts for nothing."""

    def loss(self, model, batch, tools):
        found = super().loss(model, batch, tools)
        return Loss(total=found.total * float(tools.index > 0))


def test_a_batch_that_teaches_nothing_a_warm_up_and_a_resumed_run_are_no_idle_ones(tmp_path):
    tiny_trainer(tmp_path / "batch", objective=Masked(), **adapted()).fit()
    tiny_trainer(tmp_path / "warm", **adapted(), warmup=4).fit()
    objective = grpo.build(grpo.Config(**SHORT, group=4))
    interrupt(online(tmp_path / "run", objective, differing, steps=9, checkpoint_every=2), 2)
    online(tmp_path / "run", objective, equal, steps=9, checkpoint_every=9, resume=True).fit()


def test_all_accumulated_batches_count(tmp_path):
    """A gradient of the first of them is one of the step."""

    class First(RowNoise):
        def loss(self, model, batch, tools):
            found = super().loss(model, batch, tools)
            return Loss(total=found.total * float(tools.index % 2 == 0))

    tiny_trainer(tmp_path, objective=First(), **adapted(), accumulate=2).fit()
