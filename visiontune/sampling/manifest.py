"""The list of finished images, and the checks that let a sampling run go on where it stopped.

``manifest.jsonl`` holds one line for each finished image. While a run lasts, rank 0 appends to it and every other rank
to a part of its own; parts are folded in when the next run starts and when the run ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontune import files, outside
from visiontune.errors import UserError

NAME, GRID = "manifest.jsonl", "grid.png"
_WRITTEN = re.compile(r"\d{5,}_seed-?\d+\.(png|webp)|manifest\.jsonl|grid\.png")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image to be made; ``index`` is the place of its prompt in the list."""

    index: int
    prompt: str
    seed: int
    file: str


def plan(prompts: Sequence[str], seeds: Sequence[int], suffix: str) -> list[Job]:
    """Every prompt with every seed, in an order that does not depend on what is finished."""
    return [
        Job(index=i, prompt=prompt, seed=seed, file=f"{i:05d}_seed{seed}.{suffix}")
        for i, prompt in enumerate(prompts)
        for seed in seeds
    ]


def part(out: Path, rank: int) -> Path:
    """The file that a rank appends to."""
    return out / (NAME if rank == 0 else f"manifest.rank{rank}.jsonl")


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a manifest; a last line that a kill cut short is left out.

    Raises:
        UserError: a line before the last is damaged, or a row names no file, or one outside of the folder.
    """
    lines = outside.read_bytes(path, "manifest").split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = outside.parse_json(line, where)
            if not _is_row(row):
                raise UserError(f"{where} is no row of a manifest")
        except UserError as error:
            # Only a line without its end can have been cut short.
            if number == len(lines):
                continue
            raise UserError(f"{error}: delete that line, or the folder") from error
        files.inside(path.parent, row["file"], where)
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file", "prompt")):
        return False
    optional: dict[str, type] = {"index": int, "seed": int, "threads": int, "settings": dict, "search": dict}
    return "\0" not in row["file"] and all(isinstance(row.get(key, kind()), kind) for key, kind in optional.items())


def collect(out: Path) -> list[dict[str, Any]]:
    """Fold all parts into one whole ``manifest.jsonl``, drop rows whose image is gone, and return the rows.

    For one process only, while no other writes. What a killed run left half written is removed.
    """
    files.clear_partial(out, _WRITTEN.fullmatch)
    parts = sorted(out.glob("manifest.rank*.jsonl"))
    sources = [p for p in (out / NAME, *parts) if p.exists()]
    by_file = {row["file"]: row for source in sources for row in read(source)}
    with files.writing(out / NAME):
        rows = [row for row in by_file.values() if (out / row["file"]).is_file()]
    rows.sort(key=lambda row: (row.get("index", 0), row.get("seed", 0)))
    if sources:
        files.write_text(out / NAME, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for path in parts:
        path.unlink()
    return rows


def check(rows: Iterable[Mapping[str, Any]], jobs: Sequence[Job], settings: Mapping[str, Any], out: Path) -> None:
    """Refuse a folder whose images come from other settings, other prompts or other seeds.

    Prompts may be added at the end of the list, and seeds anywhere.

    Raises:
        UserError: naming each key that differs, with both values.
    """
    wanted = {(job.index, job.seed): job for job in jobs}
    prompt_at = {job.index: job.prompt for job in jobs}
    differing: dict[str, str] = {}
    for row in rows:
        old = row.get("settings", {})
        for key in [*settings, *(k for k in old if k not in settings)]:
            if old.get(key) != settings.get(key):
                differing.setdefault(key, f"{key} was {old.get(key)!r} and is {settings.get(key)!r}")
        index, seed = row.get("index", -1), row.get("seed")
        if prompt_at.get(index) != row["prompt"]:
            now = repr(prompt_at[index]) if index in prompt_at else "gone"
            differing.setdefault("prompts", f"prompts[{index}] was {row['prompt']!r} and is {now}")
        elif (index, seed) not in wanted:
            differing.setdefault("seeds", f"seeds held {seed}")
    if differing:
        raise UserError(f"{out} holds images of another run ({'; '.join(differing.values())}): choose another out")
