"""The kernel distance of two sets of features, against double loops and closed forms in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import normalize

from visiontune.ops.mmd import squared_mmd


def unit(*shape, seed=0, shift=0.0):
    rng = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=rng, dtype=torch.float64) + shift, dim=-1)


def by_loops(x, y, degree):
    def k(u, v):
        return (sum(a * b for a, b in zip(u, v, strict=True)) + 1) ** degree

    x, y = x.tolist(), y.tolist()
    within = [sum(k(u, v) for u, v in itertools.permutations(s, 2)) / (len(s) * (len(s) - 1)) for s in (x, y)]
    return sum(within) - 2 * sum(k(u, v) for u in x for v in y) / (len(x) * len(y))


@pytest.mark.parametrize("degree", [1, 3])
def test_it_is_the_sum_over_all_pairs_of_different_vectors(degree):
    x, y = unit(2, 4, 3), unit(2, 5, 3, seed=1)
    found = squared_mmd(x, y, degree)
    assert found.dtype == torch.float64
    expected = torch.tensor([by_loops(x[i], y[i], degree) for i in range(2)], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(squared_mmd(y, x, degree), expected)


def test_its_gradient_pulls_to_the_others_and_pushes_from_its_own():
    x, y = unit(4, 3).requires_grad_(), unit(5, 3, seed=1)
    (found,) = torch.autograd.grad(squared_mmd(x, y), x)

    def slope(u, v):
        return 3 * (u @ v + 1) ** 2 * v

    own = [sum(slope(u, v) for j, v in enumerate(x) if j != i) for i, u in enumerate(x)]
    other = [sum(slope(u, v) for v in y) for u in x]
    torch.testing.assert_close(found, 2 / 12 * torch.stack(own) - 2 / 20 * torch.stack(other))


def test_it_is_nothing_on_average_where_both_are_of_one_distribution():
    found = squared_mmd(unit(2000, 8, 3), unit(2000, 8, 3, seed=1))
    error = found.std() / 2000**0.5
    assert abs(found.mean()) < 3 * error and found.min() < 0
    assert squared_mmd(unit(2000, 8, 3), unit(2000, 8, 3, seed=1, shift=0.3)).mean() > 10 * error


def test_one_vector_has_no_pairs():
    with pytest.raises(ValueError, match="sets of 4 and 1 vectors"):
        squared_mmd(unit(4, 3), unit(1, 3))
