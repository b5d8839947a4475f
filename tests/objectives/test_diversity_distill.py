"""Diversity-rewarded distillation: both members of a pair, baselines, and the sum of two gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import tiny_model
from tiny_online import Drawing, batch_of, brightness, gradient, tools_of

from visiontune.diffusion.guidance import CFG, guided
from visiontune.diffusion.replay import replay
from visiontune.diffusion.trajectory import Keep, Start, Window, rollout
from visiontune.errors import UserError
from visiontune.objectives._online import pixels
from visiontune.objectives.diversity_distill import Config, DiversityDistill, build, pair_advantages
from visiontune.rewards import diversity
from visiontune.rewards.base import as_reward

NOISY = {"gradient": "policy", "dynamics": {"name": "ddim", "eta": 1.0}}


def objective(**options) -> DiversityDistill:
    return build(Config(**{"steps": 3, "group": 3, "cfg_scale": 3.0, **options}))


def moved() -> Drawing:
    model = Drawing()
    model.move(0.3)
    return model


def lent(model):
    return tools_of(diversity.Diversity(), model=model)


def test_the_gradient_of_pairs_is_that_of_their_exact_expectation():
    """Three draws of one categorical variable: all 64 outcomes, against the derivative of E[r(y_1, y_2)]."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, generator=rng, dtype=torch.float64).requires_grad_()
    r = torch.rand(4, 4, generator=rng, dtype=torch.float64)
    r = r + r.T - torch.diag((r + r.T).diag())
    p = logits.softmax(0)
    (exact,) = torch.autograd.grad(p @ r @ p, logits, retain_graph=True)
    estimate = torch.zeros(4, dtype=torch.float64)
    without = torch.zeros(4, dtype=torch.float64)
    for y in itertools.product(range(4), repeat=3):
        at = torch.tensor(y)
        pairs = r[at][:, at] * (1 - torch.eye(3))
        d = pairs.sum(1) / 2
        chance = p[at].prod().detach()
        for into, weight in ((estimate, pair_advantages(d, 3)), (without, 2 * d)):
            (found,) = torch.autograd.grad((weight * p[at].log()).mean(), logits, retain_graph=True)
            into += chance * found
    torch.testing.assert_close(estimate, exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(without, exact, rtol=1e-12, atol=1e-14)


def test_the_distance_of_a_picture_is_set_against_the_pairs_without_it():
    distances = torch.tensor([[0, 1, 2, 3], [1, 0, 5, 7], [2, 5, 0, 4], [3, 7, 4, 0.0]]).double()
    d = distances.sum(1) / 3
    expected = [2 * (float(d[i]) - sum(float(distances[j, k]) for j, k in pairs(i)) / 3) for i in range(4)]
    torch.testing.assert_close(pair_advantages(d, 4), torch.tensor(expected).double())
    twice = pair_advantages(torch.cat([d, 3 * d]), 4)
    torch.testing.assert_close(twice[4:], 3 * twice[:4])
    assert not pair_advantages(torch.full((4,), 0.7), 4).abs().max() > 1e-6


def pairs(without: int):
    return itertools.combinations([i for i in range(4) if i != without], 2)


@pytest.mark.parametrize("options", [{"grad_steps": 2}, NOISY], ids=["pathwise", "policy"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_gradient_is_of_the_regression_less_beta_times_the_diversity(options, micro_batch):
    """Against one graph over the same chain: states and targets are constants, pictures are not."""
    model, batch = moved(), batch_of(3, 2)
    made = objective(beta=0.7, micro_batch=micro_batch, **options)
    tools = lent(model)
    loss = made.update(model, made.collect(model, batch, tools), 0, tools)
    found = gradient(model)
    chain = rollout(
        model,
        model.embed(batch.prompts),
        chain=3,
        dynamics=made.dynamics,
        start=Start(generator=tools.generators(batch)),
        keep=Keep(history=True, log_probs=made.policy),
        window=Window(steps=0 if made.policy else 2),
    )
    states = chain.latents[:, :-1].detach()
    errors = []
    for i, t in enumerate(chain.timesteps):
        with model.disable(), torch.no_grad():
            target = guided(model, states[:, i], t.expand(6), chain.cond, None, CFG(scale=3.0))
        errors.append((model.predict(states[:, i], t.expand(6), chain.cond) - target).square().mean())
    distance = diversity.Diversity().score(pixels(model, chain.final), batch.prompts, [])
    whole = torch.stack(errors).mean()
    if made.policy:
        scores = replay(model, chain)
        whole = whole - 0.7 * (pair_advantages(distance.detach(), 3)[:, None] * scores).mean()
    else:
        whole = whole - 0.7 * distance.mean()
    (expected,) = torch.autograd.grad(whole, model.delta)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    shown = torch.stack(errors).mean() - 0.7 * distance.mean()
    assert float(loss.total) == pytest.approx(float(shown.detach()), rel=1e-4)
    assert float(loss.terms["reward"]) == pytest.approx(float(distance.detach().mean()), rel=1e-4)


def test_without_beta_it_distils_alone_and_needs_no_reward():
    model, made = moved(), objective(beta=0.0)
    assert not made.needs.reward
    tools = lent(model)
    collected = made.collect(model, batch_of(3, 2), tools)
    loss = made.update(model, collected, 0, tools)
    assert "reward" not in loss.terms and float(loss.total) == pytest.approx(float(loss.terms["error"]))
    gradient(model)


@pytest.mark.parametrize(
    ("options", "reward", "told"),
    [
        (NOISY, as_reward(brightness, "toy"), "is not the distance of a prompt's pictures alone"),
        ({"micro_batch": 4}, diversity.Diversity(), "micro_batch=4 tears apart the 3 pictures of a prompt"),
        ({"gradient": "policy"}, diversity.Diversity(), "adds no noise"),
        ({"cfg_scale": 1.0}, diversity.Diversity(), "the teacher is not guided"),
    ],
)
def test_what_cannot_work_is_refused(options, reward, told):
    with pytest.raises(UserError, match=told):
        objective(**options).check(Drawing(), reward)


def test_a_model_with_guidance_inside_and_groups_that_are_too_small_are_refused():
    with pytest.raises(UserError, match="has guidance distilled into it already"):
        objective().check(tiny_model("flux"), diversity.Diversity())
    with pytest.raises(ValueError, match="group must be at least 3 with gradient=policy"):
        Config(group=2, **NOISY)
    with pytest.raises(ValueError, match="grad_steps must be at most steps"):
        Config(steps=2, grad_steps=3)
