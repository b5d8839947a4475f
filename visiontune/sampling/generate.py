"""Batched generation into a folder, resumable and on any number of processes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from visiontune import files, signals
from visiontune.errors import UserError
from visiontune.models.words import lost
from visiontune.ops.devices import check_device
from visiontune.sampling import manifest, scored, shards, sheets
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.drawing import Drawn, drawing, requests, threads
from visiontune.sampling.metadata import Metadata
from visiontune.sampling.outlook import check_disk, outlook
from visiontune.sampling.overlap import Map, Overlap
from visiontune.sampling.pipeline import images
from visiontune.sampling.searched import report
from visiontune.sampling.sources import Bench
from visiontune.sampling.task import Batch, Task, planned
from visiontune.sampling.writer import write_image

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

__all__ = ["generate", "images"]

T = TypeVar("T")
_log = logging.getLogger(__name__)


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
    check_device(config.score_device, "score_device")
    state = _processes(config.device)
    task, plan = planned(config, model)
    lock = files.Lock(task.out)
    try:
        task = replace(task, finished=_on_main(state, lambda: _open(task, lock)))
        if plan and state.is_main_process:
            say(plan)
        number = _draw(task, model, state, say)
        # One that is asked to end lets the others finish their share, unless they are asked too, as launchers do.
        number = max(gather_object([number]))
        said, warnings = _on_main(state, lambda: _close(task, number))
    finally:
        lock.release()
    for line in said if state.is_main_process else ():
        say(line)
    for line in warnings if state.is_main_process else ():
        _log.warning("%s", line)
    return task.out / manifest.NAME


def _draw(task: Task, model: PipelineModel | None, state: PartialState, say: Callable[[str], None]) -> int:
    """Draw this process's share of what is missing; the number of the signal that ended it before its time, or 0."""
    pending = [batch for batch in task.batches() if task.missing(batch)]
    mine = pending[state.process_index :: state.num_processes]
    if not mine:
        return 0
    with ExitStack() as stack:
        scorer = scored.Scorer(task.config.score, task.config.score_device) if task.config.score else None
        bench = stack.enter_context(Bench(state, model))
        asked = stack.enter_context(signals.Asked("the batch"))
        _prepare(task, bench, pending, mine, state, say, stack)
        hidden = not state.is_main_process
        bar = stack.enter_context(tqdm(total=sum(map(task.missing, mine)), unit="image", disable=hidden))
        part = manifest.part(task.out, state.process_index)

        def finish(given: tuple[Batch, list[Drawn], int], over: Map) -> int:
            return _finish(task, scorer, part, *given, over)

        overlap = stack.enter_context(Overlap(finish, task.config.workers, bar.update))
        for batch, drawn in _drawn(task, bench, mine, state, say):
            overlap.give((batch, drawn, torch.get_num_threads()))
            if asked.number:
                break
    return asked.number


def _prepare(
    task: Task,
    bench: Bench,
    pending: Sequence[Batch],
    mine: Sequence[Batch],
    state: PartialState,
    say: Callable[[str], None],
    stack: ExitStack,
) -> None:
    """With the first model open, look for room, choose the threads for as long as `stack` is, and say what is ahead."""
    config = task.cells[mine[0][0].cell].config
    model = bench.at(config)
    need = check_disk(task.config, model, task.out, sum(map(task.missing, pending)))
    stack.enter_context(threads(config, model, mine, task.finished))
    if task.config.grid is not None and state.is_main_process:
        say(outlook(task.cells, mine, model, need, state.num_processes))


def _drawn(
    task: Task, bench: Bench, batches: Sequence[Batch], state: PartialState, say: Callable[[str], None]
) -> Iterator[tuple[Batch, list[Drawn]]]:
    """Batches and their pictures, each drawn as its cell has it. Nothing outlives a cell: the next may need room."""
    known = None
    for number, group in itertools.groupby(batches, key=lambda batch: batch[0].cell):
        config = task.cells[number].config
        draw, plan = drawing(config, bench.at(config), task.search)
        if plan and state.is_main_process:
            say(plan)
        if known != (known := (bench.opened,)) and state.is_main_process:
            named = {job.index: (f"prompts[{job.index}]", job.prompt) for job in task.jobs if job.cell == number}
            texts = {"prompt": [*named.values(), ("negative_prompt", config.negative_prompt)]}
            for line in lost(bench.at(config), texts):
                _log.warning("%s", line)
        for batch in group:
            yield batch, draw(batch)
        del draw


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


def _close(task: Task, number: int) -> tuple[list[str], list[str]]:
    """Fold the parts together, make sure that nothing is missing, let go what is not kept, draw the sheets, pack.

    Args:
        number: of the signal that ended the drawing before its time; 0 for none.

    Returns:
        What is to be said of the pictures, and what to be warned of.
    """
    out, config = task.out, task.config
    rows = manifest.collect(out)
    done = {row["file"] for row in rows}
    missing = [job.file for job in task.jobs if job.file not in done]
    if missing and number:
        raise signals.Interrupted(f"{signals.name(number)} after {len(done)} of {len(task.jobs)} images", number)
    if missing:
        raise UserError(f"{len(missing)} images are missing from {out} ({missing[0]} ...): run the same command again")
    said = [*report(rows), *scored.means(rows)]
    gone: set[str] = set()
    if config.keep is not None:
        gone = scored.let_go(rows, config.keep, [scored.name_of(spec) for spec in config.score])
        rows = [{**row, "kept": row["file"] not in gone} for row in rows]
        # Who finds one of them absent after a kill is to know that it was let go.
        manifest.write(out, rows)
        said.append(f"{len(rows) - len(gone)} of {len(rows)} pictures are kept")
    for name in gone:
        (out / name).unlink(missing_ok=True)
    sheets.write(config, out, task.jobs, task.cells, gone, said.append)
    if config.format == "tar":
        by_file = {row["file"]: row for row in rows}
        shards.pack(out, [by_file[job.file] for job in task.jobs if job.file not in gone], config.shard)
    return said, scored.complaints(rows)


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
