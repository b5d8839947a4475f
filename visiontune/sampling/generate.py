"""Batched generation into a folder, resumable and on any number of processes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from visiontune import files, outside, signals
from visiontune.data.prompt_files import read_prompts
from visiontune.errors import UserError
from visiontune.models.words import lost
from visiontune.ops.devices import check_device
from visiontune.sampling import manifest, scored, shards, sheets
from visiontune.sampling.cells import Cell, cells
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.drawing import Draw, Drawn, check_guidance, drawing, requests, threads
from visiontune.sampling.manifest import Job
from visiontune.sampling.metadata import Metadata
from visiontune.sampling.outlook import check_count, check_disk, outlook
from visiontune.sampling.overlap import Map, Overlap
from visiontune.sampling.pipeline import images
from visiontune.sampling.searched import report
from visiontune.sampling.settings import settings_of
from visiontune.sampling.sources import Bench, scale_of, substituted
from visiontune.sampling.writer import write_image
from visiontune.search.asked import Asked

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

__all__ = ["generate", "images"]

T = TypeVar("T")
Batch = Sequence[Job]
_log = logging.getLogger(__name__)


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


def generate(config: SampleConfig, model: PipelineModel | None = None, say: Callable[[str], None] = _log.info) -> Path:
    """Make every prompt with every seed, in every cell of a grid, and return the path of ``manifest.jsonl``.

    Images are named by prompt index and seed, written whole or not at all, and listed in the manifest one line each;
    a run that stopped goes on with what is missing. Batches are cut from the whole list before finished ones are left
    out, so a run in several sittings or on several processes gives the bits of a run in one.

    Args:
        config: see :class:`SampleConfig`.
        model: a model to use in place of ``config.model``, with its adapters attached; ``config.adapter`` is then
            attached on top, and taken off at the end.
        say: is told, on the main process, what a grid or a search will cost, and what was scored.

    Raises:
        UserError: the prompts cannot be read, the folder holds images of other settings, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM, after the batch in which it came.
    """
    check_device(config.device, "device", ("auto",))
    scored.check(config)
    state = _processes(config.device)
    task, plan = _planned(config, model)
    lock = files.Lock(task.out)
    try:
        task = replace(task, finished=_on_main(state, lambda: _open(task, lock)))
        if plan and state.is_main_process:
            say(plan)
        number = _draw(task, model, state, say)
        # One that is asked to end lets the others finish their share, unless they are asked too, as launchers do.
        number = max(gather_object([number]))
        lines = _on_main(state, lambda: _close(task, number))
    finally:
        lock.release()
    for line in lines:
        if state.is_main_process:
            say(line)
    return task.out / manifest.NAME


def _planned(config: SampleConfig, model: PipelineModel | None) -> tuple[Task, str]:
    """Everything that is to be drawn, and what is to be said of that; mistakes are found before a model is opened."""
    if model is not None and config.grid is not None and config.grid.model:
        raise UserError("grid.model names models, and one is given already: leave one of them out")
    prompts = read_prompts(config.prompts)
    plan = check_count(len(prompts), config)
    found, jobs = [], list[Job]()
    suffix = "png" if config.format == "tar" else config.format
    for i, cell in enumerate(cells(config)):
        try:
            check_guidance(cell.config)
            own = replace(cell.config, cfg_scale=scale_of(cell.config))
            words = substituted([*prompts, own.negative_prompt], own)
        except UserError as error:
            raise UserError(cell.prefix(str(error))) from error
        found.append(replace(cell, config=replace(own, negative_prompt=words[-1])))
        jobs += manifest.plan(words[:-1], config.seed_list(), suffix, cell.name, i)
    task = Task(
        config=config,
        out=outside.expanded(config.out, "folder"),
        cells=found,
        settings=[settings_of(cell.config, model) for cell in found],
        jobs=jobs,
        search=None if config.search is None else Asked.of(config.search),
    )
    return task, plan


def _draw(task: Task, model: PipelineModel | None, state: PartialState, say: Callable[[str], None]) -> int:
    """Draw this process's share of what is missing; the number of the signal that ended it before its time, or 0."""
    pending = [batch for batch in task.batches() if task.missing(batch)]
    mine = pending[state.process_index :: state.num_processes]
    if not mine:
        return 0

    def told(line: str) -> None:
        if line and state.is_main_process:
            say(line)

    with ExitStack() as stack:
        scorer = scored.Scorer(task.config.score, task.config.score_device) if task.config.score else None
        bench = stack.enter_context(Bench(state, model))
        first = bench.at(task.cells[mine[0][0].cell].config)
        need = check_disk(task.config, first, task.out, sum(map(task.missing, pending)))
        bar = stack.enter_context(
            tqdm(total=sum(map(task.missing, mine)), unit="image", disable=not state.is_main_process)
        )
        asked = stack.enter_context(signals.Asked("the batch"))
        stack.enter_context(threads(task.cells[mine[0][0].cell].config, first, mine, task.finished))
        if task.config.grid is not None:
            told(outlook(task.cells, mine, first, need, state.num_processes))
        part = manifest.part(task.out, state.process_index)

        def finish(given: tuple[Batch, list[Drawn], int], over: Map) -> int:
            return _finish(task, scorer, part, *given, over)

        overlap = stack.enter_context(Overlap(finish, task.config.workers, bar.update))
        for batch, draw in _ways(task, bench, mine, told):
            overlap.give((batch, draw(batch), torch.get_num_threads()))
            if asked.number:
                break
    return asked.number


def _ways(
    task: Task, bench: Bench, batches: Sequence[Batch], told: Callable[[str], None]
) -> Iterator[tuple[Batch, Draw]]:
    """Batches, each with the way to draw it: that of its cell."""
    known = None
    for number, group in itertools.groupby(batches, key=lambda batch: batch[0].cell):
        config = task.cells[number].config
        model = bench.at(config)
        if model is not known:
            known = model
            named = {job.index: (f"prompts[{job.index}]", job.prompt) for job in task.jobs if job.cell == number}
            for line in lost(model, {"prompt": [*named.values(), ("negative_prompt", config.negative_prompt)]}):
                told(line)
        draw, plan = drawing(config, model, task.search)
        told(plan)
        for batch in group:
            yield batch, draw


def _finish(
    task: Task,
    scorer: scored.Scorer | None,
    part: Path,
    batch: Batch,
    drawn: list[Drawn],
    count: int,
    over: Map,
) -> int:
    """Score a batch, whole, so that no score depends on what was finished, and write what is missing of it.

    Args:
        part: the process's list of pictures. count: the threads that drew them. over: what maps the pictures.
    """
    cell, settings = task.cells[batch[0].cell], task.settings[batch[0].cell]
    pictures = [picture for picture, _ in drawn]
    scores = [{}] * len(batch) if scorer is None else scorer(np.stack(pictures), requests(cell.config, batch))
    rows = [{**more, **row, "threads": count} for (_, more), row in zip(drawn, scores, strict=True)]
    missing = [i for i, job in enumerate(batch) if job.file not in task.finished]

    def write(i: int) -> str:
        job, size = batch[i], pictures[i].shape[-3:-1]
        told = Metadata.of(job.prompt, job.seed, settings, size) if task.config.metadata else None
        return write_image(task.out / job.file, pictures[i], quality=task.config.quality, metadata=told)

    try:
        for i, digest in zip(missing, over(write, missing), strict=True):
            files.append_jsonl(part, manifest.row_of(batch[i], cell, settings, sha256=digest, **rows[i]))
    except UserError as error:
        raise UserError(f"{error}; then run the same command again, which goes on from here") from error
    return len(missing)


def _open(task: Task, lock: files.Lock) -> dict[str, int]:
    """The finished images. The folder has been put in order then, and found to be of this run."""
    lock.hold()
    names = [job.file for job in task.jobs]
    files.refuse_folders(task.out, [manifest.NAME, manifest.GRID, *names])
    rows = manifest.collect(task.out)
    manifest.check(rows, task.jobs, list(zip(task.cells, task.settings, strict=True)), task.out)
    if task.config.format == "tar" and task.config.keep is None:
        shards.check(task.out, names, task.config.shard)
    return {row["file"]: row.get("threads", 0) for row in rows}


def _close(task: Task, number: int) -> list[str]:
    """Fold the parts together, make sure that nothing is missing, let go what is not kept, draw the sheets, pack.

    Args:
        number: of the signal that ended the drawing before its time; 0 for none.

    Returns:
        What is to be said of the pictures.
    """
    out, config = task.out, task.config
    rows = manifest.collect(out)
    done = {row["file"] for row in rows}
    missing = [job.file for job in task.jobs if job.file not in done]
    if missing and number:
        raise signals.Interrupted(f"{signals.name(number)} after {len(done)} of {len(task.jobs)} images", number)
    if missing:
        raise UserError(f"{len(missing)} images are missing from {out} ({missing[0]} ...): run the same command again")
    by_file = {row["file"]: row for row in rows}
    rows = [by_file[job.file] for job in task.jobs]
    said = [*report(rows), *scored.means(rows), *scored.complaints(rows)]
    gone: set[str] = set()
    if config.keep is not None:
        gone = scored.let_go(rows, config.keep, [scored.name_of(spec) for spec in config.score])
        rows = [{**row, "kept": row["file"] not in gone} for row in rows]
        # Who finds one of them absent after a kill is to know that it was let go.
        manifest.write(out, rows)
        said.append(f"{len(rows) - len(gone)} of {len(rows)} pictures are kept")
    for name in gone:
        (out / name).unlink(missing_ok=True)
    lines: list[str] = []
    sheets.write(config, out, task.jobs, task.cells, gone, lines.append)
    if config.format == "tar":
        shards.pack(out, [row for row in rows if row["file"] not in gone], config.shard)
    return said + lines


def _processes(device: str) -> PartialState:
    """The launched processes. Without ``cpu`` set, accelerate takes each of several CPU processes for the only one."""
    return PartialState(cpu=device == "cpu" or (device == "auto" and not torch.accelerator.is_available()))


def _on_main(state: PartialState, action: Callable[[], T]) -> T:
    """Run ``action`` on the main process and give its result, or raise its :class:`UserError`, on every process."""
    answer: list[Any] = [None, None]
    if state.is_main_process:
        try:
            answer[0] = action()
        except UserError as error:
            answer[1] = error
    result, trouble = broadcast_object_list(answer)
    if trouble is not None:
        raise trouble
    return result
