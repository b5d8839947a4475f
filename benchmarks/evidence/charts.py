"""Charts of the evidence, as SVG text that does not change with the day it is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams.update({"svg.hashsalt": "visiontune", "svg.fonttype": "none", "font.family": "sans-serif"})

Points = Sequence[tuple[float, float]]


def svg(figure: Figure) -> str:
    """The text of the file."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def scatter(groups: Mapping[str, Points], x: str, y: str) -> str:
    """The mean of each group's points as its number, and a faint cross of their standard deviations."""
    figure = Figure(figsize=(8, 6))
    axes = figure.subplots()
    for i, (name, points) in enumerate(groups.items()):
        (across, up), colour = np.transpose(points), _colour(i, len(groups))
        axes.errorbar(across.mean(), up.mean(), up.std(), across.std(), ecolor=colour, alpha=0.25, label="_")
        axes.plot(across.mean(), up.mean(), marker=f"${i}$", markersize=9, color=colour, linestyle="", label=name)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small", ncols=1 + len(groups) // 24)
    return svg(figure)


def curves(panels: Sequence[tuple[str, str, Mapping[str, Sequence[Points]]]]) -> str:
    """Panels ``(x, y, {name: runs})`` side by side: the mean of each name's runs, its lowest and its highest shaded.

    The runs of a name have equally many points.
    """
    figure = Figure(figsize=(5.4 * len(panels), 4.2))
    names = list(dict.fromkeys(name for _, _, lines in panels for name in lines))
    for axes, (x, y, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, runs in lines.items():
            _curve(axes, np.array(runs), name, _colour(names.index(name), len(names)))
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    return svg(figure)


def _curve(axes: Axes, runs: np.ndarray, name: str, colour: tuple[float, ...]) -> None:
    across, up = runs[..., 0].mean(0), runs[..., 1]
    axes.plot(across, up.mean(0), marker=".", color=colour, label=name)
    axes.fill_between(across, up.min(0), up.max(0), color=colour, alpha=0.12, linewidth=0)


def _colour(i: int, count: int) -> tuple[float, ...]:
    return matplotlib.colormaps["tab10"](i) if count <= 10 else matplotlib.colormaps["nipy_spectral"](i / count)
