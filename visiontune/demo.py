"""The demonstration: personalise pocket-sd on five pictures of a subject it has never seen, and judge the result.

OFT and LoRA are trained by the catalogue's own recipes; the base and both results are measured on the same prompts and
seeds. On a CPU the three are processes of one thread each, as many at once as there are cores, since the pocket model
has too little work for two threads. Everything lands in one folder: each run with its adapter and resolved recipe,
``report.json`` and ``grid.png``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visiontune import config
from visiontune.errors import UserError
from visiontune.files import Lock, atomic_write, check_target, write_json

if TYPE_CHECKING:
    from visiontune.config import Run
    from visiontune.evaluation.personalise import Personalisation

METHODS = ("oft", "lora")
# In a run's folder it says that a demo made the run, and may remove it.
MARK = ".demo"
# Enough to judge by; the evidence asks for more, and takes longer.
SIZES: Mapping[str, Any] = {"ordinary": 60, "steps": 12}
_COLUMNS = 8
# What measuring takes, in training steps.
_MEASURING = 100


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One process's work: the base, or a recipe, and how it is measured."""

    data: Any
    recipe: Run | None
    sizes: Mapping[str, Any]


def run(out: Path, overrides: Sequence[str] = (), workers: int | None = None) -> Path:
    """Train, measure, and write the report.

    Args:
        out: folder for everything; a demo in it is replaced.
        overrides: dotted overrides for the training recipes.
        workers: processes; 1 does everything in this one. Default: on a CPU one a core, up to three.

    Returns:
        The path of ``report.json``.

    Raises:
        UserError: a run is there that no demo made.
    """
    start = time.monotonic()
    own = [f"out={out}", "preview.prompts=[]"]
    recipes = {m: config.load_run(f"personalise/{m}", [*own, f"name={m}", *overrides]) for m in METHODS}
    check_target(out / "report.json")
    for recipe in recipes.values():
        _check(recipe.folder)
    data = next(iter(recipes.values())).data
    print(f"pocket-sd meets {_subject(data)}: pictures it has never seen, called '{data.trigger}'")
    for recipe in recipes.values():
        _make_way(recipe.folder)
    jobs = {name: _Job(data=data, recipe=recipe, sizes=SIZES) for name, recipe in recipes.items()}
    jobs["base"] = _Job(data=data, recipe=None, sizes=SIZES)
    print(f"training {' and '.join(METHODS)}, and measuring both and the base ...")
    found = _all(jobs, _workers() if workers is None else workers)
    results = {name: found[name] for name in ("base", *METHODS)}

    seconds = time.monotonic() - start
    report = {"subject": _subject(data), "trigger": data.trigger, "seconds": round(seconds, 1)}
    report |= {"results": {name: result.scores() for name, result in results.items()}}
    report |= {"adapters": {m: str(recipe.folder / "adapter.safetensors") for m, recipe in recipes.items()}}
    write_json(out / "report.json", report)
    _write_grid(out / "grid.png", _references(data), results)
    print(table({name: result.scores() for name, result in results.items()}))
    print(f"{out / 'grid.png'} shows it; done in {seconds / 60:.1f} minutes")
    return out / "report.json"


def _subject(data: Any) -> str:
    return str(data.root.removeprefix("pocket/"))


def _references(data: Any) -> np.ndarray:
    from visiontune.data.readers import read

    return np.stack([np.asarray(sample.sources["image"].open()) for sample in read(data)])


# ---------------------------------------------------------------------------------------------------- processes


def _workers() -> int:
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return 1  # which is one accelerator's work
    return min(1 + len(METHODS), os.cpu_count() or 1)


def _all(jobs: Mapping[str, _Job], workers: int) -> dict[str, Personalisation]:
    """The jobs' results, the longest first."""
    runs = [job.recipe for job in jobs.values() if job.recipe is not None]
    if workers == 1:
        return {name: _measured(job) for name, job in jobs.items()}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin)
    with pool, _told(runs, len(jobs)) as results:
        for name, job in jobs.items():
            results[name] = pool.submit(_measured, job)
        try:
            return {name: future.result() for name, future in results.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    """A process of the pool: one thread, no bars of its own, and it ends with the one that began it."""
    from visiontune.quiet import defer, hushed

    hushed().__enter__()
    defer()
    os.environ["TQDM_DISABLE"] = "1"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

    import torch

    torch.set_num_threads(1)


def _measured(job: _Job) -> Personalisation:
    """Train what is to be trained, and judge the model."""
    from visiontune.assemble import assemble
    from visiontune.evaluation.personalise import measure
    from visiontune.models import load

    if job.recipe is None:
        model = load("pocket/sd")
    else:
        trainer = assemble(job.recipe)
        trainer.fit()
        model = trainer.model
    return measure(model, _subject(job.data), job.data.trigger, _references(job.data), **job.sizes)


@contextmanager
def _told(runs: Sequence[Run], measured: int) -> Iterator[dict[str, Future[Personalisation]]]:
    """A bar of what the processes have done, by what their runs log; the block fills in what is waited for."""
    from tqdm.auto import tqdm

    results: dict[str, Future[Personalisation]] = {}
    over = threading.Event()
    bar = tqdm(total=sum(run.train.steps for run in runs) + measured * _MEASURING, unit="step")

    def watch() -> None:
        while not over.wait(0.5):
            ready = sum(future.done() for future in list(results.values()))
            bar.n = sum(_logged(run.folder) for run in runs) + ready * _MEASURING
            bar.refresh()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield results
    finally:
        over.set()
        watcher.join()
        bar.close()


def _logged(folder: Path) -> int:
    """The last step of which a run has told."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError):
        return 0


# ---------------------------------------------------------------------------------------------------- the folder
def _check(folder: Path) -> None:
    if folder.exists() and not (folder / MARK).is_file():
        raise UserError(f"{folder} is not of a demo, which would replace it: choose another --out")


def _make_way(folder: Path) -> None:
    """An empty folder with the mark of a demo, in the place of an earlier demo's."""
    _check(folder)
    if folder.exists():
        lock = Lock(folder)
        lock.hold()
        shutil.rmtree(folder)
        lock.release()
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def table(results: dict[str, dict[str, float]]) -> str:
    """Scores as plain text, one model a line."""
    names = list(next(iter(results.values())))
    lines = [f"{'':<8}" + "".join(f"{name:>18}" for name in names)]
    lines += [f"{model:<8}" + "".join(f"{row[name]:>18.3f}" for name in names) for model, row in results.items()]
    return "\n".join(lines)


def _write_grid(path: Path, references: np.ndarray, results: dict[str, Personalisation]) -> None:
    """References on top; then, for each model, pictures of the subject and of ordinary prompts."""
    from visiontune.sampling.grid import grid

    blank = np.full_like(references[:1], 255)
    rows, captions = [_fill(references, blank)], ["the five pictures"]
    for name, result in results.items():
        rows.append(_fill(result.subject_pictures[::2], blank))
        captions.append(f"{name}: asked for the subject")
    for name, result in results.items():
        rows.append(_fill(result.ordinary_pictures, blank))
        captions.append(f"{name}: ordinary prompts")
    picture = grid(list(np.concatenate(rows)), columns=_COLUMNS, row_captions=captions)
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def _fill(pictures: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """Just one row of pictures, padded with white ones."""
    missing = max(0, _COLUMNS - len(pictures))
    return np.concatenate([pictures[:_COLUMNS], *([blank] * missing)])
