"""The sheets of a folder of pictures: one of prompts and seeds, or of a grid X/Y plots of any two of its axes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontune.sampling import manifest, shards
from visiontune.sampling.cells import Cell
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.grid import grid
from visiontune.sampling.manifest import Job
from visiontune.sampling.writer import write_image

_COLUMNS = 8
_MOST_PAGES = 100


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A page: pictures row by row, None where there is none, and what is written around them."""

    files: list[str | None]
    columns: list[str]
    rows: list[str]
    title: str = ""


def write(
    config: SampleConfig,
    out: Path,
    jobs: Sequence[Job],
    cells: Sequence[Cell],
    gone: set[str],
    say: Callable[[str], None],
) -> None:
    """Draw the sheets of a finished folder.

    Args:
        gone: pictures that are not there, whose places stay white.
    """
    packed = shards.members(out)

    def draw(name: str, plot: Plot) -> None:
        held = [None if f is None or f in gone else shards.opened(out, f, packed) for f in plot.files]
        sheet = grid(
            held, len(plot.columns), row_captions=plot.rows, column_captions=plot.columns, title=plot.title or None
        )
        write_image(out / name, sheet)

    if config.grid is None:
        columns = min(len(config.seed_list()), _COLUMNS, config.sheet)
        if columns:
            draw(manifest.GRID, _of_prompts(jobs, len(config.seed_list()), columns, config.sheet))
        return
    pages = plots(config.grid.plot, jobs, cells)
    drawn = {f"plot_{i:03d}.png": page for i, page in enumerate(pages[:_MOST_PAGES])}
    for name, page in drawn.items():
        draw(name, page)
    for path in out.glob("plot_*.png"):
        if manifest.is_sheet(path.name) and path.name not in drawn:
            path.unlink()  # of other axes
    if len(pages) > _MOST_PAGES:
        say(f"the first {_MOST_PAGES} of {len(pages)} plots are drawn: grid.plot with axes of more values has fewer")


def _of_prompts(jobs: Sequence[Job], seeds: int, columns: int, most: int) -> Plot:
    by_prompt = [jobs[i : i + columns] for i in range(0, len(jobs), seeds)][: most // columns]
    return Plot(
        files=[job.file for row in by_prompt for job in row],
        columns=[f"seed {job.seed}" for job in by_prompt[0]],
        rows=[row[0].prompt for row in by_prompt],
    )


def plots(names: Sequence[str], jobs: Sequence[Job], cells: Sequence[Cell]) -> list[Plot]:
    """The pages of a grid.

    Args:
        names: the axes x and y, and that of the pages, if it is named; all others have pages, too. Empty for the first
            two of the grid, or for its only one and the prompts.
    """
    axes = [*cells[0].at, "prompt", "seed"]
    x, y, *others = names or axes[:2]
    others += [axis for axis in axes if axis not in (x, y, *others)]
    words: dict[str, dict[Any, str]] = {axis: {} for axis in axes}
    files: dict[tuple[Any, ...], str] = {}
    for job in jobs:
        at = _place(job, cells[job.cell])
        for axis, (key, word) in at.items():
            words[axis].setdefault(key, word)
        files[tuple(at[axis][0] for axis in (*others, y, x))] = job.file
    pages = []
    for page in itertools.product(*(words[axis] for axis in others)):
        told = [_caption(axis, words[axis][k]) for axis, k in zip(others, page, strict=True) if len(words[axis]) > 1]
        pages.append(
            Plot(
                files=[files.get((*page, row, column)) for row in words[y] for column in words[x]],
                columns=[_caption(x, word) for word in words[x].values()],
                rows=[_caption(y, word) for word in words[y].values()],
                title=", ".join(told),
            )
        )
    return pages


def _place(job: Job, cell: Cell) -> Mapping[str, tuple[Any, str]]:
    """Where a picture stands on each axis: what tells the place from others, and its name."""
    at: dict[str, tuple[Any, str]] = {axis: (word, word) for axis, word in cell.at.items()}
    return {**at, "prompt": (job.index, job.prompt), "seed": (job.seed, str(job.seed))}


def _caption(axis: str, word: str) -> str:
    return word if axis == "prompt" else f"{axis} {word}"
