"""Batched generation into a folder, resumable and on any number of processes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from visiontune import files, outside, signals
from visiontune.core import Request
from visiontune.data.prompt_files import read_prompts
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.models.words import lost
from visiontune.ops.devices import check_device
from visiontune.ops.threads import Threads
from visiontune.sampling import manifest
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.grid import grid
from visiontune.sampling.guided import Judged, check
from visiontune.sampling.manifest import Job
from visiontune.sampling.pipeline import images
from visiontune.sampling.searched import Searcher, report
from visiontune.sampling.settings import settings_of
from visiontune.sampling.sources import loaded, settled, substituted
from visiontune.sampling.writer import write_image
from visiontune.search.asked import Asked

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

__all__ = ["generate", "images"]

T = TypeVar("T")
# A picture, and what its line in the manifest says besides.
Drawn = tuple[np.ndarray, dict[str, Any]]
_log = logging.getLogger(__name__)
_GRID_COLUMNS = 8
# Pictures of one folder: from the first on a run is likely to take days, from the second on it was not meant.
_MANY, _MOST = 10_000, 1_000_000
# Steps of a batch: a trial of numbers of threads costs about ten.
_WORTH_TRYING = 200


def generate(config: SampleConfig, model: PipelineModel | None = None, say: Callable[[str], None] = _log.info) -> Path:
    """Make every prompt with every seed and return the path of ``manifest.jsonl``.

    Images are named by prompt index and seed, written whole or not at all, and listed in the manifest one line each;
    a run that stopped goes on with what is missing. Batches are cut from the whole list before finished ones are left
    out, so a run in several sittings or on several processes gives the bits of a run in one.

    Args:
        config: see :class:`SampleConfig`.
        model: a model to use in place of ``config.model``, with its adapters attached; ``config.adapter`` is then
            attached on top, and taken off at the end.
        say: is told, on the main process, what a search will cost, and what it or a held-out reward has found.

    Raises:
        UserError: the prompts cannot be read, the folder holds images of other settings, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM, after the batch in which it came.
    """
    check_device(config.device, "device", ("auto",))
    # Mistakes before a model is opened.
    _check_guidance(config)
    config = settled(config)
    search = None if config.search is None else Asked.of(config.search)
    state = _processes(config.device)
    prompts = substituted(read_prompts(config.prompts), config)
    config = replace(config, negative_prompt=substituted([config.negative_prompt], config)[0])
    _check_count(len(prompts), config)
    jobs = manifest.plan(prompts, config.seed_list(), config.format)
    settings = settings_of(config, model)
    out = outside.expanded(config.out, "folder")
    lock = files.Lock(out)
    try:
        finished = _on_main(state, lambda: _open(out, jobs, settings, lock))
        _draw(config, model, search, state, jobs, finished, settings, out, say)
    finally:
        lock.release()
    return out / manifest.NAME


def _draw(
    config: SampleConfig,
    model: PipelineModel | None,
    search: Asked | None,
    state: PartialState,
    jobs: Sequence[Job],
    finished: dict[str, int],
    settings: dict[str, Any],
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Draw what is missing, this process its share, and finish the folder."""
    # What a search draws side by side for a picture fills a batch: so little is lost where a run is ended.
    together = max(1, config.batch_size // (1 if search is None else search.method.n))
    batches = [jobs[i : i + together] for i in range(0, len(jobs), together)]
    pending = [batch for batch in batches if any(job.file not in finished for job in batch)]
    mine = pending[state.process_index :: state.num_processes]
    number = 0
    todo = sum(job.file not in finished for batch in mine for job in batch)
    if mine:
        hidden = not state.is_main_process
        with (
            loaded(config, model, state) as ready,
            tqdm(total=todo, unit="image", disable=hidden) as bar,
            signals.Asked("the batch") as asked,
            _threads(config, ready, mine, finished),
        ):
            named = [(f"prompts[{job.index}]", job.prompt) for job in {job.index: job for job in jobs}.values()]
            for line in lost(ready, {"prompt": [*named, ("negative_prompt", config.negative_prompt)]}):
                if state.is_main_process:
                    _log.warning("%s", line)
            draw, plan = _drawing(config, ready, search)
            if plan and state.is_main_process:
                say(plan)
            for batch in mine:
                bar.update(_run(draw, batch, finished, settings, manifest.part(out, state.process_index)))
                if asked.number:
                    break
        number = asked.number
    # One that is asked to end lets the others finish their share, unless they are asked too, as launchers do.
    number = max(gather_object([number]))
    for line in report(_on_main(state, lambda: _close(config, out, jobs, number))):
        if state.is_main_process:
            say(line)


@contextmanager
def _threads(
    config: SampleConfig, model: PipelineModel, batches: Sequence[Sequence[Job]], finished: dict[str, int]
) -> Iterator[None]:
    """As many threads as drew what is finished, since another number rounds otherwise; else as many as are faster."""
    before = torch.get_num_threads()
    size = sum(tensor.numel() for network in model.networks().values() for tensor in network.parameters())
    threads = Threads(model.device, size)
    first = batches[0]
    assert config.steps is not None
    if finished:
        threads.load_state_dict({"count": max(next(iter(finished.values())), 0) or before})
    elif len(batches) * config.steps >= _WORTH_TRYING:
        one = replace(config, steps=1)
        threads.choose(lambda: _plain(one, model, first))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _options(config: SampleConfig) -> dict[str, Any]:
    """How every picture is drawn."""
    return {
        "steps": config.steps,
        "cfg_scale": config.cfg_scale,
        "guidance": GuidanceStack.of_options(config),
        "height": config.height,
        "width": config.width,
        "scheduler": config.scheduler,
    }


def _plain(config: SampleConfig, model: PipelineModel, batch: Sequence[Job]) -> list[Drawn]:
    drawn = images(
        model,
        [job.prompt for job in batch],
        [job.seed for job in batch],
        negative_prompt=config.negative_prompt,
        batch_size=len(batch),
        **_options(config),
    )
    return [(image, {}) for image in drawn]


def _drawing(
    config: SampleConfig, model: PipelineModel, search: Asked | None
) -> tuple[Callable[[Sequence[Job]], list[Drawn]], str]:
    """How a batch is drawn, and what is to be said of that."""
    options = {"batch_size": config.batch_size, **_options(config)}
    if search is not None:
        searcher = Searcher.of(search, model, **options)
        return partial(_searched, config, searcher), searcher.plan()
    if config.held_out is not None:
        return partial(_judged, config, Judged.of(config.held_out, model, **options)), ""
    return partial(_plain, config, model), ""


def _searched(config: SampleConfig, searcher: Searcher, batch: Sequence[Job]) -> list[Drawn]:
    return [(found.picture, {"search": row}) for found, row in searcher(_requests(config, batch))]


def _judged(config: SampleConfig, judged: Judged, batch: Sequence[Job]) -> list[Drawn]:
    return [(picture, {"guided": row}) for picture, row in judged(_requests(config, batch))]


def _requests(config: SampleConfig, batch: Sequence[Job]) -> list[Request]:
    return [Request(prompt=job.prompt, seed=job.seed, negative=config.negative_prompt) for job in batch]


def _check_guidance(config: SampleConfig) -> None:
    """Refuse, before a model is opened, terms that are wrong, and one in the place of a scale that was given, too."""
    stack = GuidanceStack.of_options(config)
    instead = None if stack is None else stack.base or stack.told
    if instead is not None and config.cfg_scale is not None:
        raise UserError(f"guidance has {instead.name}, which takes the place of cfg_scale: leave one of them out")
    if config.search is not None and config.held_out is not None:
        raise UserError("a search has a held_out of its own: put it there, as search.held_out")
    if config.search is None:
        check(stack, config.held_out)


def _run(
    draw: Callable[[Sequence[Job]], list[Drawn]],
    batch: Sequence[Job],
    finished: dict[str, int],
    settings: dict[str, Any],
    part: Path,
) -> int:
    """Sample one batch whole, so that its bits do not depend on what was finished; write what is missing."""
    drawn = draw(batch)
    missing = [(job, *one) for job, one in zip(batch, drawn, strict=True) if job.file not in finished]
    try:
        for job, image, more in missing:
            digest = write_image(part.parent / job.file, image)
            row = {"file": job.file, "index": job.index, "prompt": job.prompt, "seed": job.seed, "sha256": digest}
            files.append_jsonl(part, {**row, **more, "threads": torch.get_num_threads(), "settings": settings})
    except UserError as error:
        raise UserError(f"{error}; then run the same command again, which goes on from here") from error
    return len(missing)


def _open(out: Path, jobs: Sequence[Job], settings: dict[str, Any], lock: files.Lock) -> dict[str, int]:
    """The finished images, each with the threads that drew it, 0 where the manifest does not say.

    The folder has been put in order then, and found to be of this run.
    """
    lock.hold()
    files.refuse_folders(out, [manifest.NAME, manifest.GRID, *(job.file for job in jobs)])
    rows = manifest.collect(out)
    manifest.check(rows, jobs, settings, out)
    return {row["file"]: row.get("threads", 0) for row in rows}


def _close(config: SampleConfig, out: Path, jobs: Sequence[Job], number: int) -> list[dict[str, Any]]:
    """Fold the parts together, make sure that nothing is missing, draw the grid, and give the manifest's rows.

    Args:
        number: of the signal that ended the drawing before its time; 0 for none.
    """
    rows = manifest.collect(out)
    done = {row["file"] for row in rows}
    missing = [job.file for job in jobs if job.file not in done]
    if missing and number:
        raise signals.Interrupted(f"{signals.name(number)} after {len(done)} of {len(jobs)} images", number)
    if missing:
        raise UserError(f"{len(missing)} images are missing from {out} ({missing[0]} ...): run the same command again")
    columns = min(len(config.seed_list()), _GRID_COLUMNS, config.grid)
    if not columns:
        return rows
    by_prompt = [jobs[i : i + columns] for i in range(0, len(jobs), len(config.seed_list()))][: config.grid // columns]
    sheet = grid(
        [out / job.file for row in by_prompt for job in row],
        columns,
        row_captions=[row[0].prompt for row in by_prompt],
        column_captions=[f"seed {job.seed}" for job in by_prompt[0]],
    )
    write_image(out / manifest.GRID, sheet)
    return rows


def _check_count(prompts: int, config: SampleConfig) -> None:
    """Refuse more pictures than a folder can hold, before they are listed, and say when there are very many."""
    seeds = config.seed_count
    count = prompts * seeds
    words = f"{prompts} prompts and {seeds} seeds make {count} pictures"
    if count > _MOST:
        raise UserError(f"{words}, more than the {_MOST} of one folder: give fewer seeds, or parts of the prompts")
    if count > _MANY:
        warnings.warn(f"{words} of {config.steps} steps each; stopped, it goes on with what is missing", stacklevel=3)


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
