"""Guidance by a reward: closed forms on linear toys, and what it asks of reward and pipeline."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import nn

from visiontune.core import Request
from visiontune.diffusion.guidance import guided
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.errors import UserError
from visiontune.guidance.base import Point, Run
from visiontune.guidance.reward import Config
from visiontune.guidance.stack import GuidanceStack
from visiontune.models.pipeline import own_generator
from visiontune.rewards.base import Reward

REQUESTS = [Request(prompt=prompt, negative="small", seed=3) for prompt in ("a red circle", "green triangle")]


class Along(Reward):
    """How far pictures go along a direction, in float64, which the protocol of rewards would round."""

    name, differentiable = "along", True

    def __init__(self, direction):
        self.direction, self.asked = direction, []

    def score(self, images, prompts, meta):
        return (images.to(self.direction) * self.direction).flatten(1).sum(1)

    def __call__(self, images, prompts, meta=None):
        self.asked.append(list(prompts))
        return self.score(images, prompts, meta)


@functools.cache
def model(family="sd"):
    made = tiny_model(family)
    made.pipe.scheduler = made.sampler(made.samplers()[0])
    return made


def schedule(prediction):
    return Schedule.flow() if prediction == "flow" else replace(model().schedule, prediction=prediction)


@pytest.mark.parametrize("through", ["latent", "network"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_a_linear_reward_of_a_linear_network(prediction, through):
    """pred = J x, decoded as 2 x_0 - 1, and r = <a, pixels>, whose gradient in x_0 is a."""
    made, rng = schedule(prediction), torch.Generator().manual_seed(0)
    x, p, u = torch.randn(3, 2, 3, 2, 2, generator=rng, dtype=torch.float64)
    a = torch.randn(3, 2, 2, generator=rng, dtype=torch.float64)
    jacobian = torch.randn(12, 12, generator=rng, dtype=torch.float64)
    t = torch.tensor([800, 300])
    alpha, sigma = made.levels(t, 4)
    run = Run(model=SimpleNamespace(decode=lambda z: 2 * z - 1), prompts=["one", "two"])
    point = Point(x=x, t=t, levels=[0.8, 0.3], schedule=made, run=run)
    sides = SimpleNamespace(at=lambda x: (x.flatten(1) @ jacobian.T).view_as(x))
    term = Config(scale=2.0, reward=Along(a), through=through, clip=None)
    found = made.to_x_0(p + term.pull(p, u, 2.0, sides, point), x, t) - made.to_x_0(p, x, t)
    if through == "latent":
        expected = 2 * sigma**2 / (alpha**2 + sigma**2) * a
    else:
        of_x, of_pred = {
            "eps": (1 / alpha, -sigma / alpha),
            "v": (alpha, -sigma),
            "flow": (torch.ones_like(alpha), -sigma),
            "x0": (torch.zeros_like(alpha), torch.ones_like(alpha)),
        }[prediction]
        g = of_x * a + of_pred * (a.flatten() @ jacobian).view(3, 2, 2)
        expected = 2 * sigma**2 / alpha * g
        # As the papers have it: eps - sigma s g.
        noise = made.to_eps(p + term.pull(p, u, 2.0, sides, point), x, t)
        torch.testing.assert_close(noise, made.to_eps(p, x, t) - 2 * sigma * g, rtol=0, atol=1e-10)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=1e-10)
    assert term.scorer.asked[0] == ["one", "two"]

    # No longer than the step of the base, in the same direction, row by row.
    bound = replace(term, clip=0.5).pull(p, u, 2.0, sides, point)
    free = term.pull(p, u, 2.0, sides, point)
    for row in range(2):
        most = 0.5 * (p - u)[row].norm()
        expected = free[row] * min(1.0, float(most / free[row].norm()))
        torch.testing.assert_close(bound[row], expected, rtol=0, atol=1e-10)
    still = replace(term, reward=Along(0 * a), clip=1.0).pull(p, u, 2.0, sides, point)
    assert torch.equal(still, torch.zeros_like(p))


def test_steps_in_the_clean_picture_are_of_the_gradient_that_is_there():
    """Of r = -|x_0 - a|^2 / 2, k steps of c leave (1 - c)^k of the way to a."""
    made, a = schedule("flow"), torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64).view(3, 1, 1)

    def near(images, prompts, meta=None):
        return -(images - a).square().flatten(1).sum(1) / 2

    near.differentiable = True
    x, p = torch.rand(2, 1, 3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([500])
    # Halfway alpha and sigma are alike, and half of the gradient counts.
    run = Run(model=SimpleNamespace(decode=lambda z: (2 * z - 1).double()), prompts=[""])
    point = Point(x=x, t=t, levels=[0.5], schedule=made, run=run)
    term = Config(scale=0.6, reward=near, clip=None, repeats=3)
    start = made.to_x_0(p, x, t)
    found = made.to_x_0(p + term.pull(p, None, 0.6, None, point), x, t)
    torch.testing.assert_close(found, a + (1 - 0.1) ** 3 * (start - a), rtol=0, atol=1e-6)


def test_through_the_network_it_is_the_same_in_rollouts_and_on_the_stock_pipeline():
    made = model()
    weights = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    reward = Along(weights)
    spec = {"reward": reward, "through": "network", "scale": 5.0}
    stack = GuidanceStack([*GuidanceStack.of([{"cfg": 3.0}]).terms, Config(**spec, prompt="bright")])
    assert stack.plan(made, 2).rows == (3, 3)
    pictures = made.draw(REQUESTS, steps=2, guidance=stack)
    noise = torch.stack([torch.randn(made.latent_shape(), generator=own_generator(one)) for one in REQUESTS])
    with torch.no_grad():
        uncond = made.embed(["small"] * 2, negative=True)
        cond = made.embed([one.prompt for one in REQUESTS])
        final = rollout(made, cond, uncond=uncond, guidance=stack, chain=2, start=Start(latents=noise)).final
        ours = (made.decode(final) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pictures, ours, rtol=0, atol=1e-5)
    # A picture is asked by its own prompt, and a region by its own, on the stock pipeline, which says them.
    regions = [{"box": [0, 0, 8, 16], "prompt": "a blue square"}, [8, 0, 8, 16]]
    asked = Along(weights[..., :8])
    own = GuidanceStack(
        [*GuidanceStack.of([{"cfg": 3.0}, {"mixture": {"regions": regions}}]).terms, Config(reward=asked)]
    )
    made.draw(REQUESTS, steps=1, guidance=own)
    assert asked.asked == [["a blue square"] * 2, [one.prompt for one in REQUESTS]]
    with pytest.raises(UserError, match="the prompts of the pictures are not known here: set its prompt"):
        guided(made, noise, torch.tensor([500, 500]), cond, uncond, GuidanceStack([Config(reward=reward)]))


def test_without_a_bound_it_needs_no_negative_prompt():
    assert Config(reward="brightness").contrasts and not Config(reward="brightness", clip=None).contrasts
    free = GuidanceStack([Config(reward="brightness", clip=None, prompt="")])
    assert free.plan(model(), 2).rows == (1, 1) and not free.contrasts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "pocket-oracle"}, "reward 'pocket-oracle' has no gradient to guide by: take one that has"),
        ({"reward": "bright"}, "reward.name: 'bright' is not one of the rewards; did you mean 'brightness'"),
        ({"reward": 3}, "reward must be a name, or a mapping with a name, not 3"),
        ({"reward": "brightness", "repeats": 2, "through": "network"}, "set through to latent, or repeats to 1"),
        ({"reward": "brightness", "window": [0.2, 0.21]}, "reward acts at none of the steps"),
    ],
)
def test_what_cannot_guide_is_said_before_the_first_step(options, message):
    with pytest.raises(UserError, match=message):
        GuidanceStack.of([{"reward": options}]).plan(model(), 2)


def test_what_compares_pictures_or_rounds_gradients_away_is_refused():
    together = Along(torch.ones(1))
    together.groupwise = True
    with pytest.raises(UserError, match="reward 'along' compares pictures with each other"):
        GuidanceStack([Config(reward=together)]).plan(model(), 2)
    made = tiny_model()
    nn.Module.half(made.vae)
    with pytest.raises(UserError, match="gradients vanish in float16: set dtype to bf16 or fp32"):
        GuidanceStack([Config(reward="brightness")]).plan(made, 2)
