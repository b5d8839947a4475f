"""The demonstration: personalise pocket-sd on five pictures of a subject it has never seen, and judge the result.

OFT and LoRA are trained by the catalogue's own recipes, in bfloat16 where the processor has it; the base and both
results are measured on the same prompts and seeds. Everything lands in one folder: each run with its adapter and
resolved recipe, ``report.json`` and ``grid.png``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from visiontune import config
from visiontune.assemble import assemble
from visiontune.data.readers import read
from visiontune.errors import UserError
from visiontune.evaluation.personalise import Personalisation, measure
from visiontune.files import Lock, atomic_write, check_target, write_json
from visiontune.models import load
from visiontune.sampling.grid import grid
from visiontune.training.devices import native_bf16

METHODS = ("oft", "lora")
# In a run's folder it says that a demo made the run, and may remove it.
MARK = ".demo"
_COLUMNS = 8
# Enough to judge by; the evidence asks for more, and takes longer.
_ORDINARY, _STEPS = 60, 15


def run(out: Path, overrides: Sequence[str] = ()) -> Path:
    """Train, measure, and write the report.

    Args:
        out: folder for everything; a demo in it is replaced.
        overrides: dotted overrides for the training recipes.

    Returns:
        The path of ``report.json``.

    Raises:
        UserError: a run is there that no demo made.
    """
    start = time.monotonic()
    bf16 = native_bf16()
    own = [f"out={out}", "preview.prompts=[]", f"train.precision={'bf16' if bf16 else 'no'}"]
    recipes = {m: config.load_run(f"personalise/{m}", [*own, f"name={m}", *overrides]) for m in METHODS}
    check_target(out / "report.json")
    for recipe in recipes.values():
        _check(recipe.folder)
    data = recipes[METHODS[0]].data
    subject, trigger = data.root.removeprefix("pocket/"), data.trigger
    references = np.stack([np.asarray(sample.sources["image"].open()) for sample in read(data)])
    print(f"pocket-sd meets {subject}: {len(references)} pictures it has never seen, called '{trigger}'")

    print("measuring the base model ...")
    results = {
        "base": measure(load("pocket/sd"), subject, trigger, references, bf16=bf16, ordinary=_ORDINARY, steps=_STEPS)
    }
    for method, recipe in recipes.items():
        print(f"training {method}: {recipe.train.steps} steps ...")
        _make_way(recipe.folder)
        trainer = assemble(recipe)
        trainer.fit()
        print(f"measuring {method} ...")
        results[method] = measure(
            trainer.model, subject, trigger, references, bf16=bf16, ordinary=_ORDINARY, steps=_STEPS
        )

    seconds = time.monotonic() - start
    report = {"subject": subject, "trigger": trigger, "seconds": round(seconds, 1)}
    report |= {"results": {name: result.scores() for name, result in results.items()}}
    report |= {"adapters": {m: str(recipes[m].folder / "adapter.safetensors") for m in METHODS}}
    write_json(out / "report.json", report)
    _write_grid(out / "grid.png", references, results)
    print(table({name: result.scores() for name, result in results.items()}))
    print(f"{out / 'grid.png'} shows it; done in {seconds / 60:.1f} minutes")
    return out / "report.json"


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
