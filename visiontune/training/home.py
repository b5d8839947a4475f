"""The folder that a run writes to: one process writes there at a time, and removes only what the run wrote.

``.written`` lists what a run may remove again (previews, pictures of guards, results), one path a line. Whatever else
lies there is somebody's own: a run that would write in its place is refused.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from visiontune import files
from visiontune.errors import UserError

RECORD, RECIPE = ".written", "recipe.yaml"
JUDGED = "judged.json"
# What a run leaves behind: one of the two.
RESULTS = ("adapter.safetensors", "model")
_FILES = (RECORD, RECIPE, "metrics.jsonl", "README.md", "plan.safetensors", JUDGED)
_FOLDERS = ("checkpoints", "samples", "guards", "tensorboard")
_STEP = re.compile(r"step-(\d{6,})")
_PARTIAL = re.compile(r"\.step-\d{6,}\.(\d+\.tmp|old)")
# What previews consist of; runs of versions without a record are known by it.
_PREVIEW = re.compile(r"grid\.png|\d\d+_seed-?\d+\.png")


class Home:
    """A run's folder as the process has it that trains there.

    Args:
        out: the folder.
        recipe: content of its ``recipe.yaml``, written when the run begins.
    """

    def __init__(self, out: str | Path, recipe: str | None = None) -> None:
        self.out, self.recipe, self._lock = Path(out), recipe, files.Lock(out)

    def __enter__(self) -> Home:
        """Take the folder, on the first of a run's processes.

        Raises:
            UserError: another process has it.
        """
        from accelerate.utils import get_int_from_env

        if get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0) == 0:
            self._lock.hold()
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def begin(self) -> None:
        """Write the recipe, and begin the record: from now on the folder holds a run.

        What an earlier process was writing when it was killed is removed.
        """
        files.clear_partial(self.out, {*_FILES, *RESULTS}.__contains__)
        files.clear_partial(self.out / "samples", "before_after.png".__eq__)
        _write(self.out, _listed(self.out))
        if self.recipe is not None:
            files.write_text(self.out / RECIPE, self.recipe)


def refuse_unknown(out: Path) -> None:
    """Refuse files of a run's names in a folder in which no run has begun.

    Raises:
        UserError: one is there, which the run would write over.
    """
    if any((out / name).exists() for name in (RECORD, RECIPE, "checkpoints")):
        return
    for name in ("README.md", "metrics.jsonl", JUDGED):
        refuse_others(out, out / name)


def wrote(out: Path, path: Path) -> bool:
    """Whether a run lists ``path`` among what it wrote in ``out``."""
    return _name(out, path) in _listed(out)


def note(out: Path, path: Path) -> None:
    """List ``path``, before it is written."""
    if not wrote(out, path):
        _write(out, [*_listed(out), _name(out, path)])


def clear(out: Path, path: Path) -> None:
    """Remove what a run wrote at ``path``, and list it: something else takes its place.

    Raises:
        UserError: something is there that no run wrote.
    """
    refuse_others(out, path)
    if path.is_dir():
        shutil.rmtree(path)
    note(out, path)


def refuse_others(out: Path, path: Path) -> None:
    """Refuse what lies at ``path`` unless a run wrote it.

    Raises:
        UserError: nothing lists it.
    """
    if path.exists() and not wrote(out, path):
        raise UserError(f"{path} lies where the run writes, and no run wrote it: move it away, or choose another name=")


def refuse_others_kind(out: Path) -> None:
    """Refuse a folder where a run keeps a file, and a file where it keeps a folder.

    Raises:
        UserError: naming it.
    """
    for names, holds, kind in ((_FILES, Path.is_file, "a file"), (_FOLDERS, Path.is_dir, "a folder")):
        for path in (out / name for name in names):
            if os.path.lexists(path) and not holds(path):
                raise UserError(f"{path} is not {kind}, as the run needs it: move it away, or choose another name=")


def later(folder: Path, step: int) -> list[Path]:
    """The pictures of steps after ``step`` in ``folder``, which a run would write again.

    Raises:
        UserError: there are some that no run wrote.
    """
    found = [(path, _STEP.fullmatch(path.name)) for path in _in(folder)]
    after = [path for path, match in found if match and int(match[1]) > step]
    for path in after:
        refuse_others(folder.parent, path)
    return after


def forget_steps(folder: Path, step: int) -> None:
    """Remove the pictures of steps after ``step`` from ``folder``, and what a killed run left half-written.

    Raises:
        UserError: see :func:`later`.
    """
    for path in (*later(folder, step), *(path for path in _in(folder) if _PARTIAL.fullmatch(path.name))):
        shutil.rmtree(path)


def _in(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _listed(out: Path) -> list[str]:
    file = out / RECORD
    if file.is_file():
        return file.read_text(encoding="utf-8").splitlines()
    if not (out / "checkpoints").is_dir():
        return []
    # A run of a version without a record wrote results, and pictures of steps with nothing else among them.
    pictures = [
        path for path in out.glob("*/step-*") if path.parent.name != "checkpoints" and _STEP.fullmatch(path.name)
    ]
    own = [path for path in pictures if _in(path) and all(_PREVIEW.fullmatch(file.name) for file in _in(path))]
    return [*RESULTS, *(_name(out, path) for path in own)]


def _write(out: Path, names: list[str]) -> None:
    files.write_text(out / RECORD, "".join(f"{name}\n" for name in names))


def _name(out: Path, path: Path) -> str:
    return path.relative_to(out).as_posix()
