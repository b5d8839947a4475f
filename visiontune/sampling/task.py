"""What a sampling run is to draw, known before a model is opened."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune import outside
from visiontune.data.prompt_files import read_prompts
from visiontune.errors import UserError
from visiontune.sampling import manifest, scored, shown
from visiontune.sampling.cells import Cell, cells
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.drawing import check_guidance
from visiontune.sampling.manifest import Job
from visiontune.sampling.outlook import check_count
from visiontune.sampling.settings import settings_of
from visiontune.sampling.sources import base_of, settled, substituted
from visiontune.search.asked import Asked

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

Batch = Sequence[Job]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A sampling run: what is to be drawn, and where to.

    Attributes:
        config: the options. out: the folder. jobs: every picture, those of a cell together. settings: of each cell.
        search: of all pictures, if there is one. finished: the pictures that are there, each with the threads that drew
            it, 0 where the manifest does not say.
    """

    config: SampleConfig
    out: Path
    cells: Sequence[Cell]
    settings: Sequence[dict[str, Any]]
    jobs: Sequence[Job]
    search: Asked | None
    finished: dict[str, int] = field(default_factory=dict)

    def batches(self) -> list[Batch]:
        """What is drawn together, cut from all jobs, whatever is finished."""
        # What a search draws side by side for a picture fills a batch: so little is lost where a run is ended.
        size = max(1, self.config.batch_size // (1 if self.search is None else self.search.method.n))
        found: list[Batch] = []
        for _, group in itertools.groupby(self.jobs, key=lambda job: job.cell):
            own = list(group)
            found += [own[i : i + size] for i in range(0, len(own), size)]
        return found

    def missing(self, batch: Batch) -> int:
        """How many pictures of a batch are not there."""
        return sum(job.file not in self.finished for job in batch)


def planned(config: SampleConfig, model: PipelineModel | None) -> tuple[Task, str]:
    """Everything that is to be drawn, and what is to be said of that.

    Raises:
        UserError: the prompts cannot be read, options contradict each other, or a file that is named is not there.
    """
    if model is not None and config.grid is not None and config.grid.model:
        raise UserError("grid.model names models, and one is given already: leave one of them out")
    if model is not None and config.low_bits is not None:
        raise UserError("low_bits is of a model that is named, and one is given already: round that by LowBits.load")
    if config.quality is not None and config.format not in ("webp", "jpg"):
        raise UserError(f"quality is one of webp and jpg, and format is {config.format}, which loses nothing")
    scored.check(config)
    prompts = read_prompts(config.prompts)
    plan = check_count(len(prompts), config)
    found, jobs = [], list[Job]()
    suffix = "png" if config.format == "tar" else config.format
    for i, cell in enumerate(cells(config)):
        try:
            check_guidance(cell.config)
            shown.read(cell.config.picture_list(), cell.config.mask)  # that they are there, and belong together
            own = settled(cell.config)
            words = substituted([*prompts, own.negative_prompt], own)
        except UserError as error:
            raise UserError(cell.prefix(str(error))) from error
        found.append(replace(cell, config=replace(own, negative_prompt=words[-1])))
        jobs += manifest.plan(words[:-1], config.seed_list(), suffix, cell.name, i)
    if model is None:
        _check_models(config, found)
    task = Task(
        config=config,
        out=outside.expanded(config.out, "folder"),
        cells=found,
        settings=[settings_of(cell.config, model) for cell in found],
        jobs=jobs,
        search=None if config.search is None else Asked.of(config.search),
    )
    return task, plan


def _check_models(config: SampleConfig, found: Sequence[Cell]) -> None:
    """Refuse a grid whose cells are drawn with several models that nobody has named."""
    if config.model is None and config.grid is not None and not config.grid.model:
        bases = sorted({base_of(cell.config) for cell in found})
        if len(bases) > 1:
            raise UserError(
                f"the cells of the grid would be drawn with different models, {' and '.join(bases)}: name one with "
                "model=, or several in grid.model"
            )
