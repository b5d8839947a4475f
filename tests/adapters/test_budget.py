"""Budgets are met, orders kept and ties broken by place."""

from __future__ import annotations

import random

import pytest
import torch

from visiontune.adapters._budget import largest, proportional
from visiontune.errors import UserError

NAMES = "abcdefg"


def drawn(seed: int):
    rng = random.Random(seed)
    scores = {name: rng.choice([0.0, rng.random(), 10 ** rng.uniform(-9, 3)]) for name in NAMES}
    costs = {name: rng.randint(3, 90) for name in NAMES}
    caps = {name: rng.randint(1, 12) for name in NAMES}
    return scores, costs, caps, rng.randint(0, 2)


@pytest.mark.parametrize("seed", range(40))
def test_budgets_are_met_within_floors_and_caps(seed):
    scores, costs, caps, floor = drawn(seed)
    for prices in (None, costs):
        price = prices or dict.fromkeys(NAMES, 1)
        least = sum(price[n] * min(floor, caps[n]) for n in NAMES)
        most = sum(price[n] * (caps[n] if scores[n] else min(floor, caps[n])) for n in NAMES)
        budget = (least + most) // 2
        found = proportional(scores, budget, costs=prices, floor=floor, caps=caps)
        left = budget - sum(price[n] * found[n] for n in NAMES)
        assert 0 <= left < max(price.values())
        assert prices or left == 0
        assert all(min(floor, caps[n]) <= found[n] <= caps[n] for n in NAMES)
        for a in NAMES:
            for b in NAMES:
                if scores[a] > scores[b]:
                    assert found[a] >= min(found[b], caps[a])


def test_proportions_are_those_of_the_scores():
    assert proportional({"a": 3.0, "b": 1.0, "c": 0.0}, 8) == {"a": 6, "b": 2, "c": 0}
    assert proportional({"a": 3e-30, "b": 1e-30}, 8) == {"a": 6, "b": 2}
    # 5.25 and 1.75 beside the cap's 2.
    assert proportional({"a": 9.0, "b": 3.0, "c": 1.0}, 9, caps={"a": 2, "b": 9, "c": 9}) == {"a": 2, "b": 5, "c": 2}


def test_equal_scores_share_alike():
    assert proportional(dict.fromkeys(NAMES, 0.3), 7 * 16) == dict.fromkeys(NAMES, 16)
    costs = dict(zip(NAMES, (7, 9, 11, 13, 17, 19, 23), strict=True))
    assert proportional(dict.fromkeys(NAMES, 0.3), 16 * sum(costs.values()), costs=costs) == dict.fromkeys(NAMES, 16)
    assert proportional(dict.fromkeys("abc", 0.0), 7) == {"a": 3, "b": 2, "c": 2}


def test_caps_bind_and_zero_scores_stay_at_the_floor():
    caps = dict.fromkeys("ab", 4)
    assert proportional({"a": 1.0, "b": 0.0}, 9, floor=1, caps=caps) == {"a": 4, "b": 1}


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"a": 1.0, "b": float("nan")}, {}, "score of layer 'b' is not finite"),
        ({"a": 1.0, "b": 2.0}, {"floor": 3}, "3 for each of 2 layers costs 6, the budget is 5"),
    ],
)
def test_impossible_shares_are_refused(scores, options, message):
    with pytest.raises(UserError, match=message):
        proportional(scores, 5, **options)


# ---------------------------------------------------------------------------------------------------- entries


def reference(scores, budget, cost):
    """Entry by entry from a stable sort."""
    entries = [(n, i, float(v)) for n, t in scores.items() for i, v in enumerate(t.flatten()) if v > 0]
    entries.sort(key=lambda e: -e[2])
    counts = dict.fromkeys(scores, 0)
    taken = {n: [] for n in scores}
    for name, position, _ in entries:
        counts[name] += 1
        if cost(counts) > budget:
            break
        taken[name].append(position)
    return {n: sorted(p) for n, p in taken.items()}


def stepped(counts):
    """As SPT counts: 12 at most for each tensor, from its fifth entry on."""
    return sum(12 if c >= 5 else c for c in counts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [0, 1, 7, 23, 40, 1000])
@pytest.mark.parametrize("cost", [lambda counts: sum(counts.values()), stepped])
@pytest.mark.parametrize("levels", [3, 10**9])
def test_largest_entries_against_a_sort(dtype, budget, cost, levels):
    rng = torch.Generator().manual_seed(budget)
    scores = {n: torch.randint(levels, (4, 5), generator=rng).to(dtype) * 1e-9 for n in "abc"}
    found = largest(scores, budget, cost)
    assert {n: p.tolist() for n, p in found.items()} == reference(scores, budget, cost)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="score of layer 'a' is not finite"):
        largest({"a": torch.tensor([1.0, float("inf")])}, 1)
