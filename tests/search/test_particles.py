"""Weights and resampling, against what they must be on average, in float64."""

from __future__ import annotations

import pytest
import torch

from visiontune.search._particles import Particles, effective, systematic


def rewards(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_systematic_resampling_takes_each_particle_as_often_as_its_weight_says():
    weights = torch.tensor([0.05, 0.0, 0.45, 0.3, 0.2], dtype=torch.float64)
    places = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = torch.stack([torch.bincount(systematic(weights, u), minlength=5) for u in places]).double()
    # The mean over all uniform numbers, which a grid of midpoints gives to a thousandth of a particle.
    torch.testing.assert_close(counts.mean(0), 5 * weights, rtol=0, atol=1e-3)
    assert bool(((counts - 5 * weights).abs() < 1).all()), "rounded up or down"
    assert not counts[:, 1].any()


@pytest.mark.parametrize("uniform", [1e-9, 0.3, 1 - 1e-9])
def test_equal_weights_leave_every_particle_where_it_is(uniform):
    weights = torch.full((7,), 1 / 7, dtype=torch.float64)
    assert systematic(weights, uniform).tolist() == list(range(7))
    particles = Particles(1, 7, potential="difference", scale=0.0)
    particles.weigh(rewards(1, 7))
    assert particles.resample(1.0, torch.tensor([uniform])) is None
    torch.testing.assert_close(effective(particles.weights), torch.tensor([7.0], dtype=torch.float64))


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_potentials_make_up_the_tilt_of_the_last_reward(potential):
    particles = Particles(2, 4, potential=potential, scale=3.0)
    for seed in range(3):
        particles.weigh(rewards(2, 4, seed=seed))
    last = rewards(2, 4, seed=9)
    particles.weigh(last, last=True)
    torch.testing.assert_close(particles.weights, (3.0 * last).softmax(1), rtol=1e-12, atol=1e-12)


def test_potentials_weigh_on_the_way_by_what_their_name_says():
    first, second = rewards(1, 3, seed=1), rewards(1, 3, seed=2)
    for potential, expected in (
        ("difference", second),
        ("max", first + torch.maximum(first, second)),
        ("sum", 2 * first + second),
    ):
        particles = Particles(1, 3, potential=potential, scale=2.0)
        particles.weigh(first)
        particles.weigh(second)
        torch.testing.assert_close(particles.log_weights, 2.0 * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_what_was_spent_goes_with_the_particle_that_is_copied(potential):
    """After a resampling the last potential is what the copied particle's past lacks, not the place's."""
    particles = Particles(2, 4, potential=potential, scale=5.0)
    first, last = rewards(2, 4, seed=1), rewards(2, 4, seed=2)
    particles.weigh(first)
    ancestors = particles.resample(1.0, torch.tensor([0.2, 0.7]))
    assert ancestors is not None and not torch.equal(ancestors, torch.arange(4).expand(2, 4))
    assert not particles.log_weights.any()
    particles.weigh(last, last=True)
    torch.testing.assert_close(particles.log_weights, 5.0 * (last - first.gather(1, ancestors)))


def test_only_groups_whose_weights_are_uneven_are_resampled():
    particles = Particles(2, 4, potential="difference", scale=1.0)
    particles.weigh(torch.tensor([[0.0, 0.0, 0.0, 9.0], [0.0, 0.1, 0.0, 0.1]], dtype=torch.float64))
    kept = particles.log_weights[1].clone()
    ancestors = particles.resample(0.5, torch.tensor([0.5, 0.5]))
    assert ancestors.tolist() == [[3, 3, 3, 3], [0, 1, 2, 3]]
    assert not particles.log_weights[0].any() and torch.equal(particles.log_weights[1], kept)
