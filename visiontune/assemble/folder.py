"""The folder of a run: what it may already hold, and the recipe that is written into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from visiontune import catalogue
from visiontune.config import Run, parse_run
from visiontune.errors import UserError

RECIPE, PLAN = "recipe.yaml", "plan.safetensors"
# Sections that may change when a run goes on; anything else would make it another run.
_FREE = (
    "description",
    "train",
    "preview",
    *(f"guards.{name}" for name in ("on_alarm", "lr_factor", "reward_drop", "diversity_min", "high_frequency_factor")),
    *(f"guards.{name}" for name in ("blank_max", "distance_max", "change_max", "terms")),
)


def dump(run: Run) -> str:
    """The recipe as YAML, every option spelt out."""
    import yaml

    return yaml.safe_dump(run.resolved(), sort_keys=False, allow_unicode=True, width=120)


def check_folder(run: Run) -> None:
    """Refuse a folder that holds a run already, unless this run is to go on with it and is the same run.

    Raises:
        UserError: names the mend: another name, ``train.resume=true``, or the option that differs.
    """
    file = run.folder / RECIPE
    if run.folder.exists() and not run.folder.is_dir():
        raise UserError(f"{run.folder} is a file: choose another name=")
    if not file.exists():
        return
    if not run.train.resume:
        raise UserError(
            f"{run.folder} already holds a run: choose another name=, or go on with it by train.resume=true"
        )
    held = parse_run(_of_now(catalogue.read_yaml(file)))
    before = {key: value for key, value in _flat(held.resolved()) if not _free(key)}
    now = {key: value for key, value in _flat(run.resolved()) if not _free(key)}
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            was, wanted = before.get(key), now.get(key)
            raise UserError(
                f"{run.folder} holds a run with {key}={was}, not {wanted}: set it back, or choose another name="
            )


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
