"""The command line that the speed benchmarks share, and their table of goals."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from visiontune.files import write_json, write_text

RESULTS = Path(__file__).parents[1] / "results"


def row(goal: int, what: str, value: float, bar: float | None = None) -> dict[str, Any]:
    """One line of the table; smaller is better. Without a bar, or as goal 0, it is there to compare with."""
    met = "" if bar is None else "yes" if value <= bar else "no"
    print(f"{goal:>2}  {what:<75} {value:.4g}  {f'(at most {bar:g}: {met})' if met else ''}", flush=True)
    return {"goal": goal, "what": what, "value": value, "at most": bar, "met": met}


def parser(about: str | None, rounds: int = 9, threads: int = 1) -> argparse.ArgumentParser:
    """The options that every speed benchmark has."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--threads", type=int, default=threads)
    made.add_argument("--out", type=Path, default=RESULTS)
    return made


def main(name: str, about: str | None, measure: Callable[[int], Iterable[dict[str, Any]]]) -> None:
    """Measure in as many rounds as the user asks for, and write the table."""
    args = parser(about).parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    write(name, args, measure(args.rounds))


def write(name: str, args: argparse.Namespace, measured: Iterable[dict[str, Any]]) -> None:
    """Write ``<name>.json`` and ``<name>.md``, sorted by goal."""
    rows = sorted(measured, key=lambda r: r["goal"] or 99)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{name}.json", {"threads": args.threads, "rounds": args.rounds, "rows": rows})
    lines = ["| goal | what | measured | at most | met |", "|---|---|---|---|---|"]
    for r in rows:
        bar = "" if r["at most"] is None else f"{r['at most']:g}"
        lines.append(f"| {r['goal'] or ''} | {r['what']} | {r['value']:.3g} | {bar} | {r['met']} |")
    write_text(args.out / f"{name}.md", "\n".join(lines) + "\n")
