"""How well a model puts together what a prompt asks for, one category of prompts after the other.

The categories are those of Huang et al., "T2I-CompBench", NeurIPS 2023, arXiv 2307.06350: colour, shape, texture,
spatial relations, numeracy and complex prompts. A judge says of each picture how much of its prompt is there. Beside
the model's own scores stand those that tell what they are worth:

- ``shuffled``: its pictures under the prompts of others of the category, which a model that read no prompt would get;
- ``truth``: pictures that are right, where they can be drawn: what the judge gives at best;
- ``wrong``: pictures that are wrong in what the category asks about alone: what the judge is blind to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from visiontune.errors import UserError
from visiontune.sampling.pipeline import images

if TYPE_CHECKING:
    from visiontune.guidance.stack import GuidanceStack
    from visiontune.models.pipeline import PipelineModel

CATEGORIES = ("colour", "shape", "texture", "spatial", "numeracy", "complex")
# Of the pictures of a task: the same noise for every model.
_SEED = 707
_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Task:
    """One prompt.

    Attributes:
        category: of the prompt. phrases: what it asks for, each by itself; the prompt where there is but one thing.
        truth, wrong: pictures ``uint8 [h, w, 3]`` that are right, and wrong in the category's matter alone.
    """

    category: str
    prompt: str
    phrases: tuple[str, ...] = ()
    truth: Callable[[], np.ndarray] | None = None
    wrong: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one picture: ``right``, whether all is there, or how probably; ``graded``, how much of it is there."""

    right: float
    graded: float


class Judge(Protocol):
    """Scores pictures ``uint8 [n, h, w, 3]``, each for its task."""

    def __call__(self, pictures: np.ndarray, tasks: Sequence[Task]) -> list[Verdict]: ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One category, in means over its prompts: scores as the module says; those that cannot be had are None.

    ``n`` is the number of pictures and ``error`` the standard error of ``right``.
    """

    category: str
    n: int
    right: float
    error: float
    graded: float
    shuffled: float
    truth: float | None
    wrong: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found of one model: verdicts in the order of the tasks, rows by category, and the pictures."""

    model: str
    tasks: Sequence[Task]
    verdicts: list[Verdict]
    rows: list[Row]
    pictures: np.ndarray

    def table(self) -> str:
        """One line a category."""
        names = ("right", "error", "graded", "shuffled", "truth", "wrong")
        lines = [self.model, f"{'category':<10}  {'n':>4}  " + "  ".join(f"{name:>8}" for name in names)]
        for row in self.rows:
            cells = [getattr(row, name) for name in names]
            numbers = "  ".join(f"{'-':>8}" if cell is None else f"{cell:>8.3f}" for cell in cells)
            lines.append(f"{row.category:<10}  {row.n:>4}  {numbers}")
        return "\n".join(lines)

    def written(self) -> dict:
        """All but the pictures, as JSON has it."""
        each = [
            {"category": task.category, "prompt": task.prompt, **asdict(verdict)}
            for task, verdict in zip(self.tasks, self.verdicts, strict=True)
        ]
        return {"model": self.model, "rows": [asdict(row) for row in self.rows], "pictures": each}


def evaluate(
    model: PipelineModel,
    tasks: Sequence[Task],
    judge: Judge,
    *,
    name: str | None = None,
    steps: int = 25,
    cfg_scale: float = 4.0,
    guidance: GuidanceStack | None = None,
    scheduler: str = "model",
    batch_size: int = 16,
    progress: bool = False,
) -> Report:
    """Draw one picture of each task, with noise that depends on its place in the list alone, and judge it.

    Raises:
        UserError: no tasks, or what :func:`visiontune.sampling.pipeline.images` refuses.
    """
    if not tasks:
        raise UserError("there are no prompts to compose: give at least one")
    drawn = images(
        model,
        [task.prompt for task in tasks],
        [_SEED + i for i in range(len(tasks))],
        steps=steps,
        cfg_scale=cfg_scale,
        guidance=guidance,
        scheduler=scheduler,
        batch_size=batch_size,
        progress=progress,
    )
    return judged(name or model.source, tasks, drawn, judge)


def judged(name: str, tasks: Sequence[Task], pictures: np.ndarray, judge: Judge) -> Report:
    """The report on pictures ``uint8 [n, h, w, 3]`` that are there, one of each task."""
    verdicts = judge(pictures, tasks)
    places: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        places.setdefault(task.category, []).append(i)
    rows = [
        _row(category, [tasks[i] for i in own], pictures[own], [verdicts[i] for i in own], judge)
        for category, own in places.items()
    ]
    return Report(model=name, tasks=tasks, verdicts=verdicts, rows=rows, pictures=pictures)


def _row(category: str, own: Sequence[Task], drawn: np.ndarray, verdicts: Sequence[Verdict], judge: Judge) -> Row:
    right = np.array([verdict.right for verdict in verdicts])
    shuffled = judge(drawn, [*own[1:], own[0]])
    return Row(
        category=category,
        n=len(own),
        right=float(right.mean()),
        error=float(right.std(ddof=1) / len(own) ** 0.5) if len(own) > 1 else 0.0,
        graded=float(np.mean([verdict.graded for verdict in verdicts])),
        shuffled=float(np.mean([verdict.right for verdict in shuffled])),
        truth=_known([task.truth for task in own], own, judge),
        wrong=_known([task.wrong for task in own], own, judge),
    )


def _known(makes: Sequence[Callable[[], np.ndarray] | None], tasks: Sequence[Task], judge: Judge) -> float | None:
    """Mean score of pictures that are known to be right or wrong; None where some cannot be drawn."""
    made = [make() for make in makes if make is not None]
    if len(made) < len(tasks):
        return None
    return float(np.mean([verdict.right for verdict in judge(np.stack(made), tasks)]))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much more of a category one model has right than another: the mean, and an interval of 95 percent."""

    category: str
    mean: float
    low: float
    high: float


def differences(report: Report, base: Report) -> list[Difference]:
    """Paired bootstrap over the prompts of each category, which both models drew from the same noise.

    Raises:
        ValueError: the reports are of other prompts.
    """
    if [task.prompt for task in report.tasks] != [task.prompt for task in base.tasks]:
        raise ValueError("reports can be compared on the same prompts alone")
    found = []
    for row in report.rows:
        gains = np.array(
            [
                mine.right - theirs.right
                for task, mine, theirs in zip(report.tasks, report.verdicts, base.verdicts, strict=True)
                if task.category == row.category
            ]
        )
        picks = np.random.default_rng(0).integers(len(gains), size=(_RESAMPLES, len(gains)))
        low, high = np.quantile(gains[picks].mean(1), (0.025, 0.975))
        found.append(Difference(category=row.category, mean=float(gains.mean()), low=float(low), high=float(high)))
    return found


def compared(report: Report, base: Report) -> str:
    """The differences as plain text."""
    lines = [f"{report.model} beside {base.model} (difference of right, 95% by paired bootstrap over prompts)"]
    lines += [f"{d.category:<10}  {d.mean:>+7.3f}  [{d.low:+.3f}, {d.high:+.3f}]" for d in differences(report, base)]
    return "\n".join(lines)
