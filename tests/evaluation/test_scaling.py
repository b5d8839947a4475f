"""Laws of scaling: known ones are found again, intervals hold what they say, and little data says nothing."""

from __future__ import annotations

import numpy as np
import pytest

from visiontune.errors import UserError
from visiontune.evaluation.scaling import fit

SIZES = np.geomspace(1e3, 1e6, 8)


def noisy(values: np.ndarray, seed: int, share: float = 0.02) -> np.ndarray:
    return values * np.exp(share * np.random.default_rng(seed).standard_normal(values.shape))


def test_an_exact_power_is_found_exactly():
    law = fit(SIZES, 0.8 * SIZES**-0.12)
    assert law.values["a"] == pytest.approx(0.8) and law.values["b"] == pytest.approx(-0.12)
    low, high = law.interval("b")
    assert high - low < 1e-9 and law.at(2e6)[0] == pytest.approx(0.8 * 2e6**-0.12)


def test_a_power_is_found_from_two_percent_of_noise():
    law = fit(SIZES, noisy(0.8 * SIZES**-0.12, 0))
    assert law.values["b"] == pytest.approx(-0.12, abs=0.01) and law.values["a"] == pytest.approx(0.8, rel=0.1)
    low, high = law.interval("b")
    assert low < -0.12 < high and 0.001 < high - low < 0.03


def test_nine_tenths_of_intervals_hold_the_truth():
    held = []
    for seed in range(200):
        law = fit(SIZES, noisy(0.8 * SIZES**-0.12, seed), draws=200)
        low, high = law.interval("b")
        held.append(low < -0.12 < high)
    assert 0.82 < np.mean(held) < 0.97


@pytest.mark.parametrize(("limit", "c", "b"), [(0.9, -8.0, 0.4), (0.1, 5.0, 0.5)])
def test_a_saturating_law_is_found_rising_or_falling(limit, c, b):
    truth = limit + c * SIZES**-b
    law = fit(SIZES, truth, "saturating")
    assert law.values["limit"] == pytest.approx(limit, rel=2e-3) and law.values["b"] == pytest.approx(b, rel=0.02)
    assert law.values["c"] == pytest.approx(c, rel=0.1) and law.at(3e6)[0] == pytest.approx(
        limit + c * 3e6**-b, rel=1e-3
    )
    value, low, high = fit(SIZES, truth + 0.003 * np.random.default_rng(1).standard_normal(8), "saturating").at(1e7)
    assert low < limit + c * 1e7**-b < high and low < value < high


def test_fewer_points_leave_wider_intervals():
    widths = []
    for count in (4, 16):
        x = np.geomspace(1e3, 1e6, count)
        found = [fit(x, noisy(0.8 * x**-0.12, seed), draws=200).interval("b") for seed in range(20)]
        widths.append(np.mean([high - low for low, high in found]))
    assert widths[0] > 1.5 * widths[1]


def test_what_is_refused():
    with pytest.raises(UserError, match="3 different sizes are too few"):
        fit([1, 2, 3, 3], [4, 3, 2, 2.1])
    with pytest.raises(UserError, match="more than 10 times beyond"):
        fit(SIZES, SIZES**-0.1).at(1.1e7)
    with pytest.raises(UserError, match="no metric of 0 or below"):
        fit(SIZES, SIZES * 0)
    with pytest.raises(UserError, match="sizes must be above 0"):
        fit([0, 1, 2, 3], [1, 2, 3, 4])
