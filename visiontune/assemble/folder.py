"""The folder of a run: what it may already hold, and the recipe that is written into it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from visiontune import files
from visiontune.config import Run, parse_run
from visiontune.errors import UserError
from visiontune.training import home
from visiontune.training.home import RECIPE, RESULTS
from visiontune.yaml_text import read_yaml

PLAN = "plan.safetensors"
# Sections that may change when a run goes on; anything else would make it another run.
_FREE = (
    "description",
    "train",
    "preview",
    "judge",
    "model.offload",
    *(f"guards.{name}" for name in ("on_alarm", "lr_factor", "reward_drop", "diversity_min", "high_frequency_factor")),
    *(f"guards.{name}" for name in ("blank_max", "distance_max", "change_max", "terms")),
)


def dump(run: Run) -> str:
    """The recipe as YAML, every option spelt out."""
    import yaml

    return yaml.safe_dump(run.resolved(), sort_keys=False, allow_unicode=True, width=120)


def begun(run: Run) -> bool:
    """Whether the folder of ``run`` has a checkpoint or a result: what a run without either did can be done anew."""
    from visiontune.training import checkpoint

    return checkpoint.latest(run.folder) is not None or any((run.folder / name).exists() for name in RESULTS)


def check_folder(run: Run) -> None:
    """Refuse a folder that holds a run already, unless this run is to go on with it and is the same run.

    Raises:
        UserError: names the mend: another name, ``train.resume=true``, or the option that differs.
    """
    file = run.folder / RECIPE
    with files.writing(run.folder):
        place = next(path for path in (run.folder, *run.folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"{place} is a file: choose another {'name' if place == run.folder else 'out'}=")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place} cannot be written to: choose another out=, or change its permissions")
    home.refuse_others_kind(run.folder)
    if not file.exists() or not begun(run):
        return
    if not run.train.resume:
        raise UserError(
            f"{run.folder} already holds a run: choose another name=, or go on with it by train.resume=true"
        )
    held = _held(run, read_yaml(file))
    before = {key: value for key, value in _flat(held.resolved()) if not _free(key)}
    now = {key: value for key, value in _flat(run.resolved()) if not _free(key)}
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise _another(run, key, before.get(key), now.get(key))


def _another(run: Run, key: str, was: Any, wanted: Any) -> UserError:
    return UserError(f"{run.folder} holds a run with {key}={was}, not {wanted}: set it back, or choose another name=")


def _held(run: Run, recipe: Mapping[str, Any]) -> Run:
    """The run of a recipe in the folder, which may be somebody else's: only methods of ``run`` are imported."""
    for section, method in (("adapter", run.adapter), ("objective", run.objective)):
        held, wanted = recipe.get(section), "none" if method is None else method["name"]
        name = held.get("name") if isinstance(held, Mapping) else held
        if name != wanted:
            raise _another(run, f"{section}.name", name, wanted)
    return parse_run(_of_now(recipe))


def _of_now(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe without what may change, in today's names: those of visiontune 0.1 that are others now."""
    content = {key: value for key, value in recipe.items() if key != "verb" and key not in _FREE}
    objective, data = dict(content["objective"]), dict(content["data"])
    if isinstance(objective.get("timesteps"), int):
        objective["timestep_count"] = objective.pop("timesteps")
    if "max_timestep" in objective:
        low, high = objective.pop("min_timestep"), objective.pop("max_timestep")
        # Every model that 0.1 could open has a thousand timesteps.
        objective["timesteps"] = {"low": low / 1000, "high": 1.0 if high is None else high / 1000}
    named = {column: data.pop(f"{column}_column") for column in ("image", "rejected") if f"{column}_column" in data}
    if other := {column: name for column, name in named.items() if name != column}:
        data["columns"] = other
    return {**content, "objective": objective, "data": data}


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _flat(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
