"""Laws of scaling fitted to finished runs, with intervals, and what they say of somewhat larger ones.

    power:       S = a X^b              by least squares of logarithms
    saturating:  S = limit + c X^-b     by least squares of S; of a metric that rises, c is below 0

Fits of the first form are those of Li et al., "On the Scalability of Diffusion-based Text-to-Image Generation", 2024,
arXiv 2404.02883, section 5. Intervals are of a bootstrap of residuals (Efron, 1979), widened for the p values that a
fit has taken from n points: by sqrt(n / (n - p)), and by how much wider Student's nine tenths are than the normal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from visiontune.errors import UserError

Form = Literal["power", "saturating"]
Floats = NDArray[np.float64]

LEAST, FARTHEST, DRAWS = 4, 10.0, 1000
_INTERVAL = (5, 95)
# Exponents of saturating fits; closer to 0 the limit and the slope cannot be told apart.
_EXPONENTS = np.geomspace(0.01, 4, 1500)


@dataclass(frozen=True, kw_only=True)
class Law:
    """A fitted law.

    Attributes:
        values: by name: ``a`` and ``b`` of a power, ``limit``, ``c`` and ``b`` of a saturating law.
        draws: ``[draws, values]``, the same of bootstrapped points.
        x, y: what it was fitted to.
    """

    form: Form
    values: dict[str, float]
    draws: Floats
    x: Floats
    y: Floats

    def interval(self, name: str) -> tuple[float, float]:
        """Where a value lies with nine tenths."""
        low, high = np.percentile(self.draws[:, [*self.values].index(name)], _INTERVAL)
        return float(low), float(high)

    def at(self, x: float) -> tuple[float, float, float]:
        """The metric at ``x``, and the interval of the law there; a single run lies about it by its own noise.

        Raises:
            UserError: ``x`` is more than ten times beyond what was seen.
        """
        if not self.x.min() / FARTHEST <= x <= FARTHEST * self.x.max() * (1 + 1e-9):
            raise UserError(
                f"{x:g} is more than {FARTHEST:g} times beyond the runs ({self.x.min():g} to {self.x.max():g}), where "
                "a law fitted to them says nothing: ask for less, or add runs"
            )
        rows = np.vstack([[*self.values.values()], self.draws])
        found = _value(self.form, rows, np.array([x]))[:, 0]
        low, high = np.percentile(found[1:], _INTERVAL)
        return float(found[0]), float(low), float(high)


def fit(x: Sequence[float], y: Sequence[float], form: Form = "power", draws: int = DRAWS, seed: int = 0) -> Law:
    """The law of runs, each with a size (compute, parameters, pictures) and a metric.

    Args:
        x, y: of each run. draws: bootstrapped fits. seed: of them.

    Raises:
        UserError: fewer than four sizes, or a number that the form cannot have.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if len({*xs.tolist()}) < LEAST:
        raise UserError(f"{len({*xs.tolist()})} different sizes are too few for a law: give runs of {LEAST} or more")
    if not (np.isfinite(xs).all() and (xs > 0).all() and np.isfinite(ys).all()):
        raise UserError("sizes must be above 0, and metrics finite: leave out runs that failed")
    if form == "power" and not (ys > 0).all():
        raise UserError("a power law has no metric of 0 or below: leave those runs out, or take --form saturating")
    solve = _power if form == "power" else _saturating
    names = ("a", "b") if form == "power" else ("limit", "c", "b")
    target = np.log(ys) if form == "power" else ys
    best = solve(xs, target[None])[0]
    fitted = _value(form, best[None], xs)[0]
    smooth = np.log(fitted) if form == "power" else fitted
    left = (target - smooth) - (target - smooth).mean()
    free = len(xs) - len(names)
    left *= np.sqrt(len(xs) / free) * stats.t.ppf(0.95, free) / stats.norm.ppf(0.95)
    chosen = np.random.default_rng(seed).integers(len(xs), size=(draws, len(xs)))
    again = solve(xs, smooth + left[chosen])
    return Law(form=form, values=dict(zip(names, best.tolist(), strict=True)), draws=again, x=xs, y=ys)


def _value(form: Form, rows: Floats, x: Floats) -> Floats:
    """The metric ``[rows, x]`` by values ``[rows, values]``."""
    if form == "power":
        return rows[:, :1] * x ** rows[:, 1:]
    return rows[:, :1] + rows[:, 1:2] * x ** -rows[:, 2:]


def _power(x: Floats, logs: Floats) -> Floats:
    """a and b ``[n, 2]`` of logarithms ``[n, x]``."""
    slope, height = np.polyfit(np.log(x), logs.T, 1)
    return np.stack([np.exp(height), slope], 1)


def _saturating(x: Floats, y: Floats) -> Floats:
    """limit, c and b ``[n, 3]`` of metrics ``[n, x]``: for each exponent the others are linear."""
    scale = float(np.exp(np.log(x).mean()))
    best, least = np.zeros((len(y), 3)), np.full(len(y), np.inf)
    for b in _EXPONENTS:
        basis = np.stack([np.ones_like(x), (x / scale) ** -b], 1)
        found, *_ = np.linalg.lstsq(basis, y.T, rcond=None)
        error = ((y.T - basis @ found) ** 2).sum(0)
        better = error < least
        least[better] = error[better]
        best[better] = np.stack([found[0], found[1] * scale**b, np.full(len(y), b)], 1)[better]
    return best
