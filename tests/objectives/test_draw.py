"""Pictures drawn and scored for objectives that learn from them afterwards, and what is refused before."""

from __future__ import annotations

import pytest
from tiny_online import Drawing, batch_of, brightness, tools_of

from visiontune.errors import UserError
from visiontune.objectives import alignprop, ddpo, dpo_online, grpo, nft, prdp
from visiontune.rewards.base import as_reward
from visiontune.rewards.mix import Mix, Term
from visiontune.schema import from_mapping

KEEPING = [prdp, nft, dpo_online]


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("kind", KEEPING)
def test_a_groupwise_reward_sees_the_pictures_of_one_prompt_alone(kind, micro_batch):
    seen = []

    def apart(images, prompts, meta):
        seen.append((len(images), len(set(prompts))))
        return (images - images.mean(0)).abs().mean((1, 2, 3))

    apart.groupwise = True
    model = Drawing()
    objective = kind.build(kind.Config(group=4, steps=3, micro_batch=micro_batch))
    objective.collect(model, batch_of(4, 2), tools_of(apart, model=model))
    assert seen == [(4, 1), (4, 1)]


@pytest.mark.parametrize("kind", [alignprop, ddpo, grpo, *KEEPING])
def test_the_terms_of_a_mix_are_logged(kind):
    red = as_reward(lambda images, prompts, meta: images[:, 0].mean((1, 2)), "red")
    bright = as_reward(brightness, "bright")
    red.differentiable = bright.differentiable = True
    mix = Mix([bright, red], [Term(reward="bright"), Term(reward="red", weight=2.0)])
    model, rows = Drawing(), batch_of(4, 2)
    objective = kind.build(kind.Config(steps=3, micro_batch=4, **({} if kind is alignprop else {"group": 4})))
    tools = tools_of(mix, model=model)
    logged = objective.update(model, objective.collect(model, rows, tools), 0, tools).terms
    assert 0 < float(logged["reward/red"]) != float(logged["reward/bright"])
    weighted = logged["reward/bright"] + 2 * logged["reward/red"]
    assert float(logged["reward"]) == pytest.approx(float(weighted), rel=1e-5)


@pytest.mark.parametrize("kind", KEEPING)
def test_objectives_that_keep_conditions_refuse_to_train_text_encoders(kind):
    with pytest.raises(UserError, match=r"train\.parts"):
        kind.build(kind.Config()).check_text(True)


@pytest.mark.parametrize("kind", [alignprop, ddpo, grpo, *KEEPING])
@pytest.mark.parametrize("wrong", [{"steps": 0}, {"micro_batch": 0}])
def test_a_rollout_needs_steps_and_pictures(kind, wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} must be a whole number from 1"):
        from_mapping(kind.Config, wrong)


@pytest.mark.parametrize("kind", [grpo, *KEEPING])
def test_a_group_is_compared_with_itself(kind):
    with pytest.raises(UserError, match="group must be a whole number from 2"):
        from_mapping(kind.Config, {"group": 1})
    with pytest.raises(UserError, match="updates must be a whole number from 1"):
        from_mapping(kind.Config, {"updates": 0})
