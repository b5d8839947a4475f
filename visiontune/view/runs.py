"""What a page shows of a training run: its curves, alarms, previews, judgement, recipe and card."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from visiontune import outside
from visiontune.errors import UserError
from visiontune.training import guards, home, preview
from visiontune.view.thumbnails import thumbnail
from visiontune.yaml_text import parse_yaml

METRICS = "metrics.jsonl"
# How many bounds a check of the guards found broken.
_BROKEN = "guard/alarms"
_STEP = re.compile(r"step-(\d{6,})")
_PREVIEW = re.compile(r"(\d\d+)_seed(-?\d+)\.png")
_SIDE = 192


def is_run(folder: Path) -> bool:
    """Whether a run wrote here."""
    return (folder / home.RECIPE).is_file()


def read(folder: Path) -> dict[str, Any]:
    """Everything that is there of a run, which may still be going on, as JSON has it.

    Raises:
        UserError: a file of it is damaged.
    """
    metrics, alarms = _metrics(folder / METRICS)
    recipe = outside.read_text(folder / home.RECIPE, "recipe")
    return {
        "name": folder.name,
        "folder": str(folder),
        "recipe": recipe,
        "card": _text(folder / "README.md"),
        "judged": _text(folder / home.JUDGED),
        "metrics": metrics,
        "alarms": alarms,
        "prompts": _prompts(recipe),
        "previews": _previews(folder / "samples"),
        "beforeAfter": _picture(folder / preview.BEFORE_AFTER),
    }


def _text(file: Path) -> str | None:
    return outside.read_text(file, "file of the run") if file.is_file() else None


def _picture(file: Path) -> str | None:
    return thumbnail(file, 1600) if file.is_file() else None


def _metrics(file: Path) -> tuple[dict[str, list[list[float]]], list[dict[str, Any]]]:
    """Of each number that was logged its steps and values, and the alarms by step."""
    curves: dict[str, list[list[float]]] = {}
    alarms: list[dict[str, Any]] = []
    if not file.is_file():
        return curves, alarms
    for line in outside.read_text(file, "log of the run").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that is being written, or was killed
        step = row.pop("step", None)
        if not isinstance(step, int):
            continue
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                curves.setdefault(name, []).append([step, value])
        if (broken := row.get(_BROKEN)) and broken > 0:
            where = f"{guards.FOLDER}/{preview.folder(file.parent, step).name}"
            alarms.append({"step": step, "alarms": f"bounds of the guards broken: {broken:g}; see {where}"})
    return curves, alarms


def _prompts(recipe: str) -> list[str]:
    try:
        found = parse_yaml(recipe, home.RECIPE)
    except UserError:
        return []
    preview_of = found.get("preview") if isinstance(found, dict) else None
    prompts = preview_of.get("prompts", []) if isinstance(preview_of, dict) else []
    return [str(prompt) for prompt in prompts]


def _previews(folder: Path) -> list[dict[str, Any]]:
    """Of each step the previews, in the order of prompts and seeds."""
    found = []
    for place in sorted(folder.glob("step-*")) if folder.is_dir() else []:
        step = _STEP.fullmatch(place.name)
        pictures = []
        for file in sorted(place.iterdir()):
            named = _PREVIEW.fullmatch(file.name)
            if named:
                pictures.append({"prompt": int(named[1]), "seed": int(named[2]), "src": thumbnail(file, _SIDE)})
        if step and pictures:
            pictures.sort(key=lambda one: (one["prompt"], one["seed"]))
            found.append({"step": int(step[1]), "pictures": pictures})
    return found
