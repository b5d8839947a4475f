"""The pair loss on matrices, its gradient against one graph and against REINFORCE, and whole runs of it."""

from __future__ import annotations

import pytest
import torch
from tiny_online import Drawing, batch_of, gradient, most_held, tools_of

from visiontune.diffusion.replay import replay
from visiontune.errors import UserError
from visiontune.objectives import prdp
from visiontune.objectives.prdp import Config, build, matched
from visiontune.schema import from_mapping

STEPS, GROUP = 4, 4
OPTIONS = {"group": GROUP, "steps": STEPS, "cfg_scale": 2.0, "beta": 0.1, "clip": None}


def matrices(rows=8, steps=5, seed=0):
    """implied, old [b, k], rewards, prompts [b], in float64."""
    rng = torch.Generator().manual_seed(seed)
    implied, old = (torch.randn(rows, steps, generator=rng, dtype=torch.float64) for _ in range(2))
    rewards = torch.randn(rows, generator=rng, dtype=torch.float64)
    return implied, old, rewards, torch.arange(rows) // GROUP


def differentiated(objective, implied, old, rewards, prompts):
    implied = implied.clone().requires_grad_()
    loss = objective.loss(implied, old, rewards, prompts)
    return loss.detach(), torch.autograd.grad(loss, implied)[0]


def by_hand(config, implied, old, rewards, prompts):
    """The definition, pair by pair."""
    found = []
    for a in range(len(rewards)):
        for b in range(len(rewards)):
            if prompts[a] != prompts[b] or rewards[a] <= rewards[b]:
                continue
            pair = []
            for clip in (None, config.clip):
                rhat = []
                for row in (a, b):
                    steps = [float(v) for v in implied[row]]
                    if clip is not None:
                        steps = [
                            min(max(v, float(o) - clip), float(o) + clip) for v, o in zip(steps, old[row], strict=True)
                        ]
                    rhat.append(sum(steps) / (len(steps) if config.over_steps == "mean" else 1))
                pair.append((rhat[0] - rhat[1] - float(rewards[a] - rewards[b]) / config.beta) ** 2)
            found.append(max(pair))
    return sum(found) / len(found)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("over_steps", ["sum", "mean"])
def test_the_loss_is_its_definition(over_steps, clip):
    config = Config(beta=0.7, clip=clip, over_steps=over_steps)
    found = build(config).loss(*matrices())
    assert float(found) == pytest.approx(by_hand(config, *matrices()), rel=1e-12)


@pytest.mark.parametrize("over_steps", ["sum", "mean"])
def test_loss_and_gradient_are_zero_at_the_optimum(over_steps):
    objective = build(Config(beta=0.5, clip=0.1, over_steps=over_steps))
    implied, _, rewards, prompts = matrices()
    constant = torch.tensor([3.0, -1.0], dtype=torch.float64)[prompts]
    steps = implied.shape[1] if over_steps == "sum" else 1
    wanted = (rewards / 0.5 + constant)[:, None] / steps
    optimum = implied - implied.mean(1, keepdim=True) + wanted
    loss, grad = differentiated(objective, optimum, optimum.clone(), rewards, prompts)
    assert float(loss) < 1e-24 and grad.abs().max() < 1e-12
    assert float(objective.loss(implied, implied, rewards, prompts)) > 0.1


def test_constants_of_a_prompt_change_nothing_and_neither_does_the_order():
    objective = build(Config(beta=0.5, clip=0.3))
    implied, old, rewards, prompts = matrices()
    loss, grad = differentiated(objective, implied, old, rewards, prompts)
    shift = torch.tensor([2.0, -5.0], dtype=torch.float64)[prompts]
    for other in (
        (implied, old, rewards + shift, prompts),
        (implied + shift[:, None], old + shift[:, None], rewards, prompts),
    ):
        same, also = differentiated(objective, *other)
        torch.testing.assert_close(same, loss, rtol=1e-11, atol=0)
        torch.testing.assert_close(also, grad, rtol=1e-11, atol=1e-12)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    mixed, back = differentiated(objective, implied[order], old[order], rewards[order], prompts[order])
    torch.testing.assert_close(mixed, loss)
    torch.testing.assert_close(back, grad[order])


def test_ties_and_other_prompts_are_no_pairs():
    rewards = torch.tensor([1.0, 1.0, 2.0, 2.0, 0.0])
    pairs = matched(rewards, torch.tensor([0, 0, 0, 1, 1])).nonzero().tolist()
    assert pairs == [[2, 0], [2, 1], [3, 4]]
    implied, old, _, prompts = matrices()
    level = torch.ones(8, dtype=torch.float64)
    loss, grad = differentiated(build(Config()), implied, old, level, prompts)
    assert float(loss) == 0 and not grad.any()
    assert float(build(Config()).terms(implied, old, level, prompts)["ties"]) == 1


def test_the_first_gradient_is_that_of_reinforce_with_the_mean_of_the_group():
    """sum over pairs of (r_a - r_b)(g_a - g_b) = B sum over rows of (r - mean r) g, for each group."""
    implied, _, rewards, prompts = matrices()
    start = torch.zeros_like(implied)
    _, grad = differentiated(build(Config(beta=0.5, clip=0.1, over_steps="sum")), start, start, rewards, prompts)
    centred = rewards - torch.stack([rewards[prompts == p].mean() for p in prompts])
    pairs = matched(rewards, prompts).sum()
    expected = -2 * GROUP * centred / 0.5 / pairs
    torch.testing.assert_close(grad, expected[:, None].expand_as(grad), rtol=1e-12, atol=1e-14)


def clipped_pair(change, beta=1.0, clip=0.1):
    """Gradient of the better row's one step, moved by `change` from the rollout; both rows started at 0."""
    objective = build(Config(beta=beta, clip=clip))
    implied = torch.tensor([[change], [0.0]], dtype=torch.float64)
    rewards, prompts = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros(2)
    return differentiated(objective, implied, torch.zeros_like(implied), rewards, prompts)[1][0].item()


def test_clipping_stops_a_step_that_has_gone_far_enough_towards_the_target_and_no_other():
    assert clipped_pair(0.05) == pytest.approx(2 * (0.05 - 1))  # inside
    assert clipped_pair(0.3) == 0  # outside, nearer to the target: the clipped error is the larger one
    assert clipped_pair(-0.3) == pytest.approx(2 * (-0.3 - 1))  # outside, away from it: pulled back
    assert clipped_pair(0.3, clip=None) == pytest.approx(2 * (0.3 - 1))
    assert clipped_pair(2.0) == pytest.approx(2 * (2.0 - 1))  # past the target the unclipped error is the larger one


def test_a_clip_range_far_below_the_rewards_over_beta_still_clips(monkeypatch):
    """Log-probabilities come in float32, in which both errors would be equal to each other."""
    model, sent = Drawing(), []
    objective = build(Config(**OPTIONS | {"beta": 1e-9, "clip": 1e-6}))
    collected = objective.collect(model, batch_of(GROUP, 1), tools_of(model=model))
    best = collected.rewards.argmax()
    collected.old[best] -= 1e-4  # as if its steps had become likelier since
    monkeypatch.setattr(prdp, "backpropagate_scores", lambda model, trajectory, weights: sent.append(weights))
    single = tools_of(model=model, gather=lambda value: value.float() if value.is_floating_point() else value)
    objective.update(model, collected, 1, single)
    assert not sent[0][best].any()
    assert sent[0].any(1).sum() == GROUP - 1


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_two_passes_give_the_gradient_of_one_graph(prediction, micro_batch):
    model = Drawing(prediction)
    dynamics = "flow-sde" if prediction == "flow" else {"name": "ddim", "eta": 0.8}
    options = {**OPTIONS, "clip": 0.01, "dynamics": dynamics, "micro_batch": micro_batch}
    objective = build(Config(**options))
    model.move(0.05)
    lent = tools_of(model=model, scale=8.0)
    collected = objective.collect(model, batch_of(GROUP, 2), lent)
    model.move(0.05, seed=1)
    loss = objective.update(model, collected, 1, lent)
    found = gradient(model)
    whole = torch.cat([replay(model, t) for t in collected.trajectories])
    values = (whole - collected.base, collected.old - collected.base, collected.rewards.double(), collected.prompts)
    total = objective.loss(*values)
    total.backward()
    torch.testing.assert_close(found, 8 * gradient(model), rtol=1e-10, atol=1e-12)
    assert float(loss.total) == pytest.approx(total.item(), rel=1e-6)
    assert float(loss.terms["clipped"]) > 0
    assert not loss.total.requires_grad


def test_the_reference_is_the_model_without_its_adapter():
    model, untouched = Drawing(), Drawing()
    model.move()
    objective = build(Config(**OPTIONS))
    collected = objective.collect(model, batch_of(GROUP, 1), tools_of(model=model))
    untouched.delta.data = torch.zeros_like(model.delta)
    with torch.no_grad():
        again = torch.cat([replay(untouched, t) for t in collected.trajectories])
    assert torch.equal(again, collected.base)
    assert not torch.equal(collected.old, collected.base)
    assert model.on


def held(steps):
    model = Drawing()
    objective = build(Config(**OPTIONS | {"steps": steps}))
    collected = objective.collect(model, batch_of(GROUP, 1), tools_of(model=model))
    return most_held(lambda: objective.update(model, collected, 0, tools_of(model=model)))


def test_memory_does_not_grow_with_the_chain():
    assert held(12) == held(4) > 0


def test_log_probabilities_that_are_not_met_again_stop_the_run():
    model = Drawing()
    objective = build(Config(**OPTIONS))
    collected = objective.collect(model, batch_of(GROUP, 1), tools_of(model=model))
    start = objective.update(model, collected, 0, tools_of(model=model))
    assert float(start.terms["kl"]) == 0 and float(start.terms["clipped"]) == 0
    model.move(0.5)
    with pytest.raises(UserError, match=r"log-probability of step \d \(t = \d+\) differs by"):
        objective.update(model, collected, 0, tools_of(model=model))
    objective.update(model, collected, 1, tools_of(model=model))


def test_two_ranks_take_the_gradient_of_one():
    model, halves = Drawing(), []
    objective = build(Config(**OPTIONS | {"clip": 0.01}))
    model.move()
    whole = objective.collect(model, batch_of(GROUP, 2), tools_of(model=model))
    parts = [objective.collect(model, batch_of(GROUP, 1, rank=r, world=2), tools_of(model=model)) for r in (0, 1)]
    for name in ("old", "base", "rewards", "prompts"):
        together = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(together, getattr(whole, name), rtol=1e-12, atol=1e-12)
    model.move(0.02, seed=1)
    expected = objective.update(model, whole, 1, tools_of(model=model))
    grad = gradient(model)
    with torch.no_grad():
        now = [torch.cat([replay(model, t) for t in part.trajectories]) for part in parts]
    values = {
        "implied": [n - p.base for n, p in zip(now, parts, strict=True)],
        "old": [p.old - p.base for p in parts],
        "rewards": [p.rewards for p in parts],
        "prompts": [p.prompts for p in parts],
    }
    for rank, part in enumerate(parts):
        calls = iter(values.values())
        lent = tools_of(model=model, rank=rank, world=2, gather=lambda value, calls=calls: torch.cat(next(calls)))
        loss = objective.update(model, part, 1, lent)
        torch.testing.assert_close(loss.total, expected.total)
        for name in expected.terms.keys() - whole.terms.keys():
            torch.testing.assert_close(loss.terms[name], expected.terms[name])
        halves.append(gradient(model))
    torch.testing.assert_close((halves[0] + halves[1]) / 2, grad, rtol=1e-10, atol=1e-12)


def test_what_the_log_says():
    objective = build(Config(beta=1.0, clip=0.5))
    implied, _, rewards, prompts = matrices()
    old = implied.clone()
    old[0, :2] += 0.6
    tied = rewards.clone()
    tied[1] = tied[0]
    terms = objective.terms(implied, old, tied, prompts)
    assert float(terms["clipped"]) == pytest.approx(2 / implied.numel())
    assert float(terms["ties"]) == pytest.approx(1 / 12)
    assert float(terms["kl"]) == pytest.approx(float(implied.sum(1).mean()))
    exact = 3 * rewards[:, None].expand_as(implied) + torch.tensor([4.0, 0.0]).double()[prompts][:, None]
    assert float(objective.terms(exact, exact, rewards, prompts)["agreement"]) == pytest.approx(1)
    assert float(objective.terms(-exact, -exact, rewards, prompts)["agreement"]) == pytest.approx(-1)


def test_training_brings_implied_rewards_to_what_beta_asks_for():
    """At a fixed rollout the implied rewards come to be those that beta asks for."""
    model = Drawing()
    objective = build(Config(**OPTIONS | {"beta": 2.0, "over_steps": "sum", "steps": 3}))
    collected = objective.collect(model, batch_of(GROUP, 1), tools_of(model=model))
    optimizer = torch.optim.Adam([model.delta], lr=3e-3)
    log = []
    for _ in range(60):
        loss = objective.update(model, collected, 1, tools_of(model=model))
        optimizer.step()
        optimizer.zero_grad()
        log.append((float(loss.total), float(loss.terms["agreement"])))
    assert log[-1][0] < 0.3 * log[0][0]
    assert log[-1][1] > 0.9


def test_what_cannot_work_is_refused_before_anything_is_drawn():
    model = Drawing()
    with pytest.raises(UserError, match=r"'ddim' adds no noise.*set its eta above 0"):
        build(Config(**OPTIONS | {"dynamics": "ddim"})).check(model, object())
    with pytest.raises(UserError, match="for flow models"):
        build(Config(**OPTIONS | {"dynamics": "flow-sde"})).check(model, object())
    assert model.calls == 0
    for wrong in ({"group": 1}, {"beta": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            from_mapping(Config, wrong)
