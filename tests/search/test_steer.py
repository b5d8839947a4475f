"""Feynman-Kac steering against closed forms, in float64, on a world of Gaussians."""

from __future__ import annotations

import math

import pytest
import torch

from visiontune.core import Condition
from visiontune.diffusion.dynamics import DDIM, FlowSDE
from visiontune.diffusion.guidance import NO_GUIDANCE
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.errors import UserError
from visiontune.guidance import apg
from visiontune.guidance.stack import GuidanceStack
from visiontune.search._particles import Particles
from visiontune.search._steer import Walk, steer

MEAN, DEVIATION, STEPS = 0.5, 0.8, 8


class Gaussian:
    """The exact network of latents of one number, N(MEAN, DEVIATION^2)."""

    device = torch.device("cpu")

    def __init__(self):
        self.schedule = Schedule.flow()

    def latent_shape(self):
        return 1, 1, 1

    def predict(self, x_t, t, cond):
        alpha, sigma = self.schedule.levels(t, 4)
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        x_0 = MEAN + gain * (x_t - alpha * MEAN)
        return (x_t - x_0) / sigma

    def unconditional(self, count):
        return nothing(count)


def nothing(count):
    return Condition(tokens=torch.zeros(count, 1, 1))


def walk(rows, dynamics, seed=0, **options):
    """From float64 noise."""
    model, generator = Gaussian(), torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 1, 1, 1, dtype=torch.float64, generator=generator)
    noise = torch.randn(rows, STEPS, 1, 1, 1, dtype=torch.float64, generator=generator)
    given = {
        "model": model,
        "cond": nothing(rows),
        "uncond": None,
        "chain": model.schedule.timesteps(STEPS),
        "guidance": NO_GUIDANCE,
        "dynamics": dynamics,
        "start": Start(latents=latents, noise=noise),
    }
    return Walk(**{**given, **options})


def steered(walked, groups, *, scale, potential="difference", least=0.5, visits=(2, 4, 6), value=None):
    count = len(walked.cond) // groups
    return steer(
        walked,
        Particles(groups, count, potential=potential, scale=scale),
        value or (lambda x_0, rows: x_0.flatten()),
        visits=visits,
        least=least,
        generators=[torch.Generator().manual_seed(group) for group in range(groups)],
    )


def sampled(walked):
    """The end of the plain rollout."""
    given = {name: getattr(walked, name) for name in ("uncond", "guidance", "chain", "dynamics", "start")}
    return rollout(walked.model, walked.cond, **given).final


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
@pytest.mark.parametrize("dynamics", [DDIM(eta=1.0), FlowSDE(eta=0.7)], ids=["ddim", "flow-sde"])
def test_the_weighted_mean_is_that_of_the_tilted_gaussian(dynamics, potential):
    """A Gaussian N(m, v) times exp(scale x) is N(m + scale v, v); m and v are those of the plain sampler."""
    plain = sampled(walk(100_000, dynamics, seed=1)).flatten()
    scale, groups = 0.8, 400
    expected, spread = float(plain.mean() + scale * plain.var()), float(plain.std())
    assert math.isclose(float(plain.mean()), MEAN, abs_tol=0.02), "the sampler draws what the network knows"
    found = steered(walk(groups * 256, dynamics, seed=2), groups, scale=scale, potential=potential, least=1.0)
    means = (found.weights * found.final.view(groups, -1)).sum(1)
    assert all(ancestors is not None for _, _, ancestors in found.visits)
    error = float(means.std()) / math.sqrt(groups)
    assert error < 0.02 * spread
    # A ratio of sums of 256 particles is biased, by far less than the tilt.
    assert abs(float(means.mean()) - expected) < 4 * error + 0.01 * spread < 0.1 * scale * spread**2


def test_without_a_strength_it_is_the_rollout_to_the_bit():
    walked = walk(12, DDIM(eta=1.0))
    found = steered(walked, 3, scale=0.0, least=1.0)
    assert torch.equal(found.final, sampled(walked))
    assert [ancestors for _, _, ancestors in found.visits] == [None] * 3
    torch.testing.assert_close(found.weights, torch.full((3, 4), 0.25, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_group_is_steered_as_if_it_were_alone_and_always_alike():
    walked = walk(8, DDIM(eta=1.0))
    both = steered(walked, 2, scale=4.0, least=1.0)
    assert any(ancestors is not None for _, _, ancestors in both.visits)
    again = steered(walk(8, DDIM(eta=1.0), batch_size=3), 2, scale=4.0, least=1.0)
    assert torch.equal(both.final, again.final) and torch.equal(both.weights, again.weights)
    start = Start(latents=walked.start.latents[:4], noise=walked.start.noise[:4])
    alone = steered(walk(4, DDIM(eta=1.0), start=start), 1, scale=4.0, least=1.0)
    assert torch.equal(both.final[:4], alone.final)


def test_particles_go_on_from_their_ancestors():
    """A reward that knows the winner at once: every particle of the group descends from it."""
    found = steered(walk(4, DDIM(eta=1.0)), 1, scale=50.0, visits=(4,), value=lambda x_0, rows: x_0.flatten())
    ((step, rewards, ancestors),) = found.visits
    best = int(rewards[0].argmax())
    assert step == 4 and ancestors.tolist() == [[best] * 4]
    assert len(found.final.unique()) == 4, "and copies part by their own noise"


def test_guidance_that_remembers_is_refused():
    with pytest.raises(UserError, match="set momentum to 0"):
        steered(walk(4, DDIM(eta=1.0), guidance=GuidanceStack([apg.Config(scale=3)])), 1, scale=1.0)
