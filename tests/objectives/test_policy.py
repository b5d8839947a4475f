"""Advantages, the clipped surrogate, and rollouts that are scored again: `_advantages.py` and `_policy.py`."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest
import torch
from tiny_online import Gaussian, batch_of, brightness, no_reference, shifted_reference, tools_of
from tiny_training import TinyModel

from visiontune.diffusion.replay import backpropagate_scores, replay, revisit
from visiontune.diffusion.transition import gaussian_kl
from visiontune.errors import UserError
from visiontune.objectives import ddpo, grpo
from visiontune.objectives._advantages import extremes, flat_share, group_advantages, standardised, tracked_advantages
from visiontune.objectives._policy import clipped_surrogate
from visiontune.rewards.base import FunctionReward, Reward

PROMPTS = torch.tensor([0, 1, 0, 1, 0, 2, 2])
VALUES = torch.tensor([1.0, 5.0, 2.0, 7.0, 6.0, 3.0, 3.0], dtype=torch.float64)


def objective(kind=grpo, **options):
    defaults = {"steps": 4, "cfg_scale": 1.0, "dynamics": "flow-sde" if kind is grpo else {"name": "ddim", "eta": 1.0}}
    return kind.build(kind.Config(**defaults | {"group": 4} | options))


# ---------------------------------------------------------------------------------------------------- advantages


def test_a_group_is_a_prompt_wherever_its_rows_stand():
    found = group_advantages(VALUES, PROMPTS)
    for prompt in (0, 1):
        own = VALUES[prompt == PROMPTS].numpy()
        np.testing.assert_allclose(found[prompt == PROMPTS], (own - own.mean()) / own.std())
    assert torch.equal(found[5:], torch.zeros(2, dtype=torch.float64))
    by_all = group_advantages(VALUES, PROMPTS, global_std=True)
    np.testing.assert_allclose(by_all[[0, 2, 4]], (VALUES[[0, 2, 4]] - 3) / VALUES.numpy().std())
    for name in (0, 1, 2):
        assert abs(float(found[name == PROMPTS].sum())) < 1e-12
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(group_advantages(VALUES[order], PROMPTS[order]), found[order])
    assert float(flat_share(found, PROMPTS)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("level", [0.0, 0.1, -1e6])
def test_rewards_that_are_all_equal_teach_nothing(level):
    values, prompts = torch.full((3,), level, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    assert not group_advantages(values, prompts).any()
    assert not group_advantages(values, prompts, True).any()
    assert not tracked_advantages(values, prompts, {}, 8, 2).any()
    assert flat_share(group_advantages(values, prompts), prompts) == 1


def test_rewards_that_differ_by_rounding_around_zero_teach_nothing():
    values = torch.tensor([6e-8, -6e-8, 0.0, 0.0], dtype=torch.float64)
    prompts = torch.zeros(4, dtype=torch.long)
    spread = torch.cat([values, torch.tensor([0.0, 1.0])]), torch.cat([prompts, torch.ones(2, dtype=torch.long)])
    assert not group_advantages(values, prompts).any()
    assert group_advantages(*spread, True).tolist() == [0, 0, 0, 0, *group_advantages(*spread, True)[4:].tolist()]
    assert not tracked_advantages(values, prompts, {}, 8, 2).any()
    assert not standardised(values, values.mean(), values.std()).any()
    # Whoever has a reward of that size says so.
    assert float(group_advantages(values, prompts, noise=0.0)[0]) == pytest.approx(2**0.5)
    small = objective(reward_noise=1e-9).normalise(values, prompts, "reward", tools_of())
    assert float(small.max()) == pytest.approx(2**0.5)
    assert not objective().normalise(values, prompts, "reward", tools_of()).any()


def test_the_tracker_takes_over_once_a_prompt_has_enough():
    seen: dict = {}
    first = tracked_advantages(VALUES, PROMPTS, seen, 4, 4)
    np.testing.assert_allclose(first, (VALUES - VALUES.mean()) / VALUES.std(unbiased=False))
    again = torch.tensor([4.0, 8.0], dtype=torch.float64)
    second = tracked_advantages(again, torch.tensor([0, 1]), seen, 4, 4)
    known = np.array([1.0, 2.0, 6.0, 4.0])
    assert float(second[0]) == pytest.approx((4 - known.mean()) / known.std())
    assert float(second[1]) == pytest.approx((8 - 6) / 2)
    assert seen[0] == [1.0, 2.0, 6.0, 4.0] and seen[1] == [5.0, 7.0, 8.0]
    tracked_advantages(again, torch.tensor([0, 0]), seen, 4, 4)
    assert seen[0] == [6.0, 4.0, 4.0, 8.0]


def test_the_best_and_the_worst_are_picked_and_of_equals_the_first():
    scores = torch.tensor([0.0, 3.0, -1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    assert extremes(scores, 4, 2).nonzero().flatten().tolist() == [1, 2, 4, 7]
    assert extremes(scores, 4, 3).nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 7]
    assert extremes(scores, 4, 4).all()


# ----------------------------------------------------------------------------------------------------- surrogate


def test_the_surrogate_is_ppos():
    old = torch.zeros(4, 2, dtype=torch.float64)
    now = torch.tensor([[0.3, -0.3], [0.3, -0.3], [0.05, 0.0], [0.3, -0.3]], dtype=torch.float64, requires_grad=True)
    gain = torch.tensor([2.0, -2.0, 2.0, 0.0], dtype=torch.float64)
    loss, clipped = clipped_surrogate(now, old, gain, 0.1)
    ratio = now.detach().exp()
    expected = [
        [-2 * 1.1, -2 * float(ratio[0, 1])],
        [2 * float(ratio[1, 0]), 2 * 0.9],
        [-2 * float(ratio[2, 0]), -2.0],
        [0.0, 0.0],
    ]
    np.testing.assert_allclose(loss.detach(), expected)
    assert clipped.tolist() == [[True, False], [False, True], [False, False], [False, False]]
    loss.sum().backward()
    assert now.grad[0, 0] == 0 and now.grad[1, 1] == 0 and now.grad[0, 1] == -2 * ratio[0, 1]


# ------------------------------------------------------------------------------------------------------ rollouts


def collected(model, built, tools=None, group=4, count=2, **cut):
    tools = tools or tools_of()
    return built.collect(model, batch_of(group, count, **cut), tools), tools


def spend(model, built, rollouts, tools, parts=None):
    for part in parts if parts is not None else range(built.updates):
        loss = built.update(model, rollouts, part, tools)
    return loss


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
@pytest.mark.parametrize("dynamics", ["flow-sde", "dance-sde", "cps"])
def test_the_gradient_is_that_of_one_graph(dynamics, micro_batch):
    """At the weights of the rollout ratios are 1, so it is also the score gradient weighed by advantages."""
    model = Gaussian()
    built = objective(dynamics=dynamics, micro_batch=micro_batch, beta=0.7, last_step=True)
    tools = tools_of(reference=shifted_reference(model.mean, 0.3))
    rollouts, _ = collected(model, built, tools)
    loss = spend(model, built, rollouts, tools)
    found = model.mean.grad.clone()

    model.mean.grad = None
    total, likelihood = [], []
    for chunk in rollouts.pieces[0]:
        trajectory = chunk.trajectory
        steps = trajectory.scored.nonzero().flatten().tolist()
        surrogate, _ = clipped_surrogate(
            replay(model, trajectory), trajectory.log_probs[:, steps], chunk.advantages, built.config.clip
        )
        kls = []
        for step in steps:
            mean, std = revisit(model, trajectory, step)
            with tools.reference(), torch.no_grad():
                base = revisit(model, trajectory, step)[0]
            kls.append(gaussian_kl(mean, base, std))
        total.append(surrogate + 0.7 * torch.stack(kls, 1))
        likelihood.append(chunk.advantages.float())
    whole = torch.cat(total).mean()
    whole.backward()
    torch.testing.assert_close(found, model.mean.grad, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.total, whole.detach(), rtol=1e-5, atol=1e-6)
    assert loss.terms["kl"] > 0 and loss.terms["clip_fraction"] == 0

    model.mean.grad = None
    alone = objective(dynamics=dynamics, micro_batch=micro_batch, last_step=True)
    spend(model, alone, rollouts, tools)
    score = model.mean.grad.clone()
    model.mean.grad = None
    for chunk in rollouts.pieces[0]:
        k = int(chunk.trajectory.scored.sum())
        weights = -chunk.advantages[:, None].expand(-1, k) / (8 * k)
        backpropagate_scores(model, chunk.trajectory, weights)
    torch.testing.assert_close(score, model.mean.grad, rtol=1e-6, atol=0)
    assert score != 0


def test_the_gradient_follows_finite_differences_of_the_loss():
    model = Gaussian()
    built = objective(clip=10.0, beta=0.2)
    tools = tools_of(reference=shifted_reference(model.mean, -0.2))
    rollouts, _ = collected(model, built, tools)
    values = []
    for shift in (1e-3, -1e-3, 0.0):
        with torch.no_grad():
            model.mean.fill_(0.05 + shift)
        model.mean.grad = None
        chunk = rollouts.pieces[0][0]
        sums = built.gradients(model, chunk, built.timesteps(chunk, 0, tools), 1.0, False, tools)
        values.append(float(sums["loss"].double().sum()))
    assert float(model.mean.grad) == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-3)


@pytest.mark.parametrize("kind", [grpo, ddpo])
def test_before_the_first_update_every_ratio_is_exactly_one(kind):
    model = TinyModel() if kind is ddpo else Gaussian()
    if kind is ddpo:
        model.denoiser.requires_grad_(True)
    built = objective(kind, micro_batch=3, timestep_fraction=0.5, cfg_scale=2.0)
    tools = tools_of()
    rollouts, _ = collected(model, built, tools)
    seen = []
    built.require_ratio_one = lambda drift, t: seen.append(drift)
    spend(model, built, rollouts, tools)
    assert len(seen) == 3 and all(not drift.any() for drift in seen)


def test_a_drift_before_the_first_update_ends_the_run():
    model, built = Gaussian(), objective()
    rollouts, tools = collected(model, built)
    with torch.no_grad():
        model.mean.add_(0.1)
    with pytest.raises(UserError, match=r"before the first update a log-probability differs by .* \(at t = \d+"):
        spend(model, built, rollouts, tools)
    built = objective(updates=2)
    rollouts, tools = collected(model, built)
    with torch.no_grad():
        model.mean.add_(0.1)
    assert spend(model, built, rollouts, tools, [1]).terms["clip_fraction"] > 0


def test_rows_that_teach_nothing_are_left_out_and_change_no_gradient():
    def half(images, prompts, meta):
        scores = images.mean((1, 2, 3))
        return torch.where(torch.tensor([p == prompts[0] for p in prompts]), 0.25, scores)

    model, built = Gaussian(), objective()
    rollouts, tools = collected(model, built, tools_of(half))
    assert sum(len(chunk) for chunk in rollouts.pieces[0]) == 4
    assert rollouts.terms["flat_prompts"] == 0.5 and rollouts.rows == 8
    model.calls.clear()
    spend(model, built, rollouts, tools)
    assert model.calls == [4, 4, 4]
    found = model.mean.grad.clone()
    model.mean.grad = None
    built.pack = lambda model, chunks: chunks
    rollouts, _ = collected(model, built, tools)
    assert sum(len(chunk) for chunk in rollouts.pieces[0]) == 8
    spend(model, built, rollouts, tools)
    torch.testing.assert_close(found, model.mean.grad, rtol=1e-6, atol=1e-12)


def test_a_rollout_without_differences_leaves_the_weights_alone():
    model, built = Gaussian(), objective()
    rollouts, tools = collected(model, built, tools_of(lambda images, prompts, meta: torch.ones(len(images))))
    loss = spend(model, built, rollouts, tools)
    assert model.mean.grad is None and float(loss.total) == 0
    assert loss.terms["flat_prompts"] == 1 and set(loss.terms) >= {"reward", "reward_std", "clip_fraction"}


def test_updates_share_the_rows_out_and_inner_epochs_go_through_them_again():
    model, built = Gaussian(), objective(updates=2, inner_epochs=2, micro_batch=3)
    assert built.updates == 4
    rollouts, tools = collected(model, built)
    assert [[len(chunk) for chunk in piece] for piece in rollouts.pieces] == [[3, 1], [3, 1]]
    rows = [torch.cat([chunk.batch.data["row"] for chunk in piece]) for piece in rollouts.pieces]
    assert torch.cat(rows).sort().values.tolist() == list(range(8)) and rollouts.rows == 4
    assert torch.cat(rows).tolist() != list(range(8))
    spent = []
    built.gradients = lambda model, chunk, steps, *rest: (
        spent.append(chunk.batch.ids)
        or {name: torch.zeros(len(chunk), steps.shape[1]) for name in ("loss", "clipped", "kl")}
    )
    spend(model, built, rollouts, tools)
    assert len(spent) == 8
    with pytest.raises(UserError, match=r"objective\.updates=3"):
        collected(model, objective(updates=3))


def test_advantages_belong_to_their_rows_whatever_the_order_they_are_drawn_in():
    model = Gaussian()
    whole, _ = collected(model, objective())
    dealt, _ = collected(model, objective(updates=2, micro_batch=3))
    by_row = [
        dict(zip(torch.cat([c.batch.data["row"] for p in r.pieces for c in p]).tolist(),
                 torch.cat([c.advantages for p in r.pieces for c in p]).tolist(), strict=True))
        for r in (whole, dealt)
    ]  # fmt: skip
    assert by_row[0] == pytest.approx(by_row[1], abs=1e-5)


def test_each_group_has_timesteps_of_its_own():
    model, built = Gaussian(), objective(steps=10, timestep_fraction=0.4, group=2)
    rollouts, tools = collected(model, built, group=2, count=4)
    (chunk,) = rollouts.pieces[0]
    steps = built.timesteps(chunk, 0, tools)
    assert steps.shape == (8, 4) and (steps.diff() > 0).all() and steps.max() < 9
    pairs = steps.view(4, 2, 4)
    assert torch.equal(pairs[:, 0], pairs[:, 1]) and len(pairs[:, 0].unique(dim=0)) > 1
    assert not torch.equal(steps, built.timesteps(chunk, 1, tools))
    assert torch.equal(steps, built.timesteps(chunk, 0, tools))
    model.calls.clear()
    spend(model, built, rollouts, tools)
    assert model.calls == [8] * 4


# ------------------------------------------------------------------------------------------------------- rewards


class Two(Reward):
    """Two terms of very different scales, of which only the second tells pictures of a group apart by much."""

    weights = MappingProxyType({"large": 1.0, "small": 2.0})

    def score(self, images, prompts, meta):
        mean = images.mean((1, 2, 3))
        self.terms = {"large": 1000 * mean, "small": images.amax((1, 2, 3)) / 1000 + self.offset}
        return self.terms["large"] + 2 * self.terms["small"]

    offset = 0.0


def test_each_reward_of_a_mix_is_normalised_by_itself():
    model, built = Gaussian(), objective(per_reward=True, advantage_clip=100.0)
    rollouts, _ = collected(model, built, tools_of(Two()))
    (chunk,) = rollouts.pieces[0]
    shown = (model.decode(chunk.trajectory.final) / 2 + 0.5).double()
    prompts = chunk.batch.data["prompt"]
    expected = group_advantages(shown.mean((1, 2, 3)), prompts) + 2 * group_advantages(shown.amax((1, 2, 3)), prompts)
    torch.testing.assert_close(chunk.advantages, expected, rtol=1e-2, atol=1e-2)
    other = Two()
    other.offset = 5.0
    moved, _ = collected(model, built, tools_of(other))
    torch.testing.assert_close(moved.pieces[0][0].advantages, chunk.advantages, rtol=5e-2, atol=5e-2)
    raw, _ = collected(model, objective(advantage_clip=100.0), tools_of(Two()))
    assert (raw.pieces[0][0].advantages - chunk.advantages).abs().max() > 0.5
    assert {"reward/large", "reward/small"} <= set(rollouts.terms)
    with pytest.raises(UserError, match="per_reward is for a reward mix"):
        built.check(model, FunctionReward(brightness, "brightness"))


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
@pytest.mark.parametrize("updates", [1, 2])
def test_a_groupwise_reward_sees_whole_groups(micro_batch, updates):
    seen = []

    def apart(images, prompts, meta):
        assert len(set(prompts)) == 1
        seen.append(len(images))
        return (images - images.mean(0)).abs().mean((1, 2, 3))

    apart.groupwise = True
    model = Gaussian()
    built = objective(micro_batch=micro_batch, updates=updates)
    # Two of the four groups have the same prompt and are not mixed.
    rollouts, _ = collected(model, built, tools_of(apart), count=4, prompts=("a", "b", "c"))
    assert seen == [4, 4, 4, 4]
    rows = torch.cat([c.batch.data["row"] for p in rollouts.pieces for c in p])
    latents = torch.cat([c.trajectory.final for p in rollouts.pieces for c in p])[rows.argsort()]
    pictures = (model.decode(latents) / 2 + 0.5).view(4, 4, 3, 2, 2)
    expected = (pictures - pictures.mean(1, keepdim=True)).abs().mean((2, 3, 4)).flatten()
    assert float(rollouts.terms["reward"]) == pytest.approx(float(expected.mean()), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- refusal


@pytest.mark.parametrize("dynamics", ["flow-ode", {"name": "flow-sde", "eta": 0.0}, {"name": "cps", "eta": 0}])
def test_a_sampler_without_noise_is_refused_before_anything_is_drawn(dynamics):
    model = Gaussian()
    with pytest.raises(UserError, match="adds no noise, so no step has a log-probability"):
        objective(dynamics=dynamics).check(model, FunctionReward(brightness, "brightness"))
    assert not model.calls


def test_a_sampler_of_another_kind_of_model_is_refused():
    with pytest.raises(UserError, match="for flow models"):
        objective(dynamics="dance-sde").check(TinyModel(), FunctionReward(brightness, "brightness"))
    with pytest.raises(UserError, match="needs a reward"):
        objective().check(Gaussian(), None)


def test_the_base_is_asked_for_only_where_it_is_compared_with():
    assert not objective().needs.reference and objective(beta=0.1).needs.reference
    assert objective(ddpo, kl_penalty=0.1).needs.reference and not objective(ddpo).needs.reference
    collected(Gaussian(), objective(), tools_of(reference=no_reference))
