"""What a page shows of a folder of pictures that `visiontune sample` drew."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from visiontune import outside
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.sampling import manifest, shards
from visiontune.view.thumbnails import thumbnail

SCORES = "scores.json"
# Thousands of pictures are to fit into one page.
_SIDES = ((500, 192), (2000, 128), (1_000_000, 80))
_COMMAND = (
    "model",
    "revision",
    "variant",
    "dtype",
    "steps",
    "cfg_scale",
    "scheduler",
    "height",
    "width",
    "format",
    "quality",
)


def is_folder_of_samples(folder: Path) -> bool:
    """Whether a sampling run wrote here."""
    return (folder / manifest.NAME).is_file()


def count(folder: Path) -> int:
    """How many pictures a folder lists; 0 where no sampling run wrote."""
    file = folder / manifest.NAME
    return outside.read_bytes(file, "manifest").count(b"\n") if file.is_file() else 0


def read(folder: Path) -> dict[str, Any]:
    """Every finished picture with what is known of it, as JSON has it.

    Raises:
        UserError: the manifest is damaged, or a picture.
    """
    rows = sorted(filter(manifest.is_kept, manifest.read(folder / manifest.NAME)), key=lambda row: row["file"])
    side = next(side for most, side in _SIDES if len(rows) <= most)
    scores, packed = _scores(folder / SCORES), shards.members(folder)
    there = [row for row in rows if row["file"] in packed or (folder / row["file"]).is_file()]
    return {
        "name": folder.name,
        "folder": str(folder),
        "pictures": [_shown(row, shards.opened(folder, row["file"], packed), side, scores) for row in there],
        "missing": len(rows) - len(there),
    }


def _shown(
    row: Mapping[str, Any], source: Path | IO[bytes], side: int, scores: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    settings = row.get("settings", {})
    return {
        "file": row["file"],
        "prompt": row.get("prompt", ""),
        "seed": row.get("seed"),
        "adapter": _adapters(settings),
        "at": row.get("at", {}),
        "scores": {**_own_scores(row), **scores.get(row["file"], {})},
        "command": command(row),
        "src": thumbnail(source, side, exact=side == _SIDES[0][1]),
    }


def _replaced(settings: Mapping[str, Any]) -> bool:
    """Whether a term of guidance took the place of the scale."""
    stack = GuidanceStack.of(settings.get("guidance") or [])
    return bool(stack.base or stack.told)


def _adapters(settings: Mapping[str, Any]) -> str:
    named = [f"{Path(one['file']).parent.name}/{Path(one['file']).name}" for one in settings.get("adapter") or []]
    return ", ".join(named) or "none"


def _own_scores(row: Mapping[str, Any]) -> dict[str, float]:
    """What a search or a held-out reward scored while it was drawn; of each pair the picture that was kept."""
    found = {name: float(score) for name, score in row.get("scores", {}).items() if score is not None}
    for kind in ("search", "guided"):
        for name in ("reward", "held_out"):
            pair = row.get(kind, {}).get(name)
            if pair:
                found[name] = float(pair[1])
    return found


def _scores(file: Path) -> dict[str, dict[str, float]]:
    """By file, as `visiontune score FOLDER ... --out FOLDER/scores.json` writes them."""
    if not file.is_file():
        return {}
    held = outside.parse_json(outside.read_bytes(file, "scores"), str(file))
    try:
        return {
            row["file"]: {k: float(v) for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
            for row in held["images"]
        }
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{file} holds no scores of images: write it by visiontune score FOLDER --out {file}"
        ) from error


def command(row: Mapping[str, Any]) -> str:
    """What draws a picture again, by the same search where there was one."""
    settings = row.get("settings", {})
    words = [f"prompts={json.dumps([row.get('prompt', '')], ensure_ascii=False)}", f"seeds=[{row.get('seed')}]"]
    named = [name for name in _COMMAND if settings.get(name) not in (None, "model", "tar")]
    words += [f"{name}={settings[name]}" for name in named if name != "cfg_scale" or not _replaced(settings)]
    if settings.get("negative_prompt"):
        words.append(f"negative_prompt={json.dumps(settings['negative_prompt'], ensure_ascii=False)}")
    adapter = [{"file": one["file"], "scale": one.get("scale", 1.0)} for one in settings.get("adapter") or []]
    if adapter:
        words += [f"adapter={json.dumps(adapter)}", f"adapter_scale={settings.get('adapter_scale', 1.0)}"]
    for name in ("guidance", "search", "held_out"):
        if settings.get(name):
            words.append(f"{name}={json.dumps(settings[name])}")
    return shlex.join(["visiontune", "sample", *words])
