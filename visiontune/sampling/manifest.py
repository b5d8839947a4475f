"""The list of finished images, and the checks that let a sampling run go on where it stopped.

``manifest.jsonl`` holds one line for each finished image, whether it lies in the folder or in a shard, or was let go
for better ones. While a run lasts, rank 0 appends to it and every other rank to a part of its own; parts are folded in
when the next run starts and when the run ends.
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
from visiontune.sampling import shards
from visiontune.sampling.cells import Cell

NAME, GRID = "manifest.jsonl", "grid.png"
_PICTURE = r"([a-z]\d+)*_?\d{5,}_seed-?\d+\.(png|webp|jpg)"
_SHEET = r"grid\.png|plot_\d+\.png"
_WRITTEN = re.compile(rf"{_PICTURE}|manifest\.jsonl|{_SHEET}|{shards.NAMED.pattern}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image to be made; ``index`` is the place of its prompt in the list, ``cell`` that of its cell of the grid."""

    index: int
    prompt: str
    seed: int
    file: str
    cell: int = 0


def plan(prompts: Sequence[str], seeds: Sequence[int], suffix: str, name: str = "", cell: int = 0) -> list[Job]:
    """Every prompt with every seed, in an order that does not depend on what is finished.

    Args:
        name: of the cell of a grid; see :class:`visiontune.sampling.cells.Cell`. cell: its place among the cells.
    """
    first = f"{name}_" if name else ""
    return [
        Job(index=i, prompt=prompt, seed=seed, file=f"{first}{i:05d}_seed{seed}.{suffix}", cell=cell)
        for i, prompt in enumerate(prompts)
        for seed in seeds
    ]


def row_of(job: Job, cell: Cell, settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The line of an image."""
    where = {"cell": cell.name, "at": cell.at} if cell.name else {}
    known = {"file": job.file, "index": job.index, "prompt": job.prompt, "seed": job.seed}
    return {**known, **where, **more, "settings": settings}


def is_sheet(name: str) -> bool:
    """Whether a file is one that shows others together."""
    return re.fullmatch(_SHEET, name) is not None


def is_kept(row: Mapping[str, Any]) -> bool:
    """Whether the image of a row was not let go for better ones."""
    return row.get("kept") is not False


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
    optional |= {"cell": str, "at": dict, "scores": dict, "unscored": dict, "kept": bool}
    return "\0" not in row["file"] and all(isinstance(row.get(key, kind()), kind) for key, kind in optional.items())


def collect(out: Path) -> list[dict[str, Any]]:
    """Fold all parts into one whole ``manifest.jsonl``, drop rows whose image got lost, and return the rows.

    For one process only, while no other writes. What a killed run left half written is removed.
    """
    files.clear_partial(out, _WRITTEN.fullmatch)
    parts = sorted(out.glob("manifest.rank*.jsonl"))
    sources = [p for p in (out / NAME, *parts) if p.exists()]
    by_file = {row["file"]: row for source in sources for row in read(source)}
    with files.writing(out / NAME):
        packed = shards.members(out)
        rows = [r for r in by_file.values() if not is_kept(r) or r["file"] in packed or (out / r["file"]).is_file()]
    rows.sort(key=lambda row: (row.get("cell", ""), row.get("index", 0), row.get("seed", 0)))
    if sources:
        write(out, rows)
    for path in parts:
        path.unlink()
    return rows


def write(out: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole manifest anew."""
    files.write_text(out / NAME, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def check(
    rows: Iterable[Mapping[str, Any]],
    jobs: Sequence[Job],
    cells: Sequence[tuple[Cell, Mapping[str, Any]]],
    out: Path,
) -> None:
    """Refuse a folder whose images come from other settings, other prompts or other seeds.

    Prompts and values of a grid's axes may be added at the end of their lists, and seeds anywhere.

    Args:
        cells: each with its settings.

    Raises:
        UserError: naming each key that differs, with both values.
    """
    settings_of = {cell.name: settings for cell, settings in cells}
    names = [cell.name for cell, _ in cells]
    wanted = {(names[job.cell], job.index, job.seed) for job in jobs}
    prompt_at = {(names[job.cell], job.index): job.prompt for job in jobs}
    differing: dict[str, str] = {}
    for row in rows:
        cell, index, seed = row.get("cell", ""), row.get("index", -1), row.get("seed")
        if cell not in settings_of:
            differing.setdefault("grid", f"its grid had {_cell(row)}, which is gone")
            continue
        old, settings = row.get("settings", {}), settings_of[cell]
        for key in [*settings, *(k for k in old if k not in settings)]:
            if old.get(key) != settings.get(key):
                differing.setdefault(key, f"{key} was {old.get(key)!r} and is {settings.get(key)!r}")
        if prompt_at.get((cell, index)) != row["prompt"]:
            now = repr(prompt_at[cell, index]) if (cell, index) in prompt_at else "gone"
            differing.setdefault("prompts", f"prompts[{index}] was {row['prompt']!r} and is {now}")
        elif (cell, index, seed) not in wanted:
            differing.setdefault("seeds", f"seeds held {seed}")
    if differing:
        raise UserError(f"{out} holds images of another run ({'; '.join(differing.values())}): choose another out")


def _cell(row: Mapping[str, Any]) -> str:
    at = row.get("at", {})
    return ", ".join(f"{axis} {word}" for axis, word in at.items()) or "no axes"
