"""Subject learnt against knowledge kept for every adapter of the catalogue, compared where they know equally much.

    python benchmarks/evidence/adapters.py

The recipes of ``pipelines/personalise`` at their full length, with ranks of about as many trained values as OFT's with
blocks of 8 where a recipe trains more. Every method is tried at the same five factors of its recipe's learning rate,
two decades in all, on one subject and seed; the best of them then trains another subject with three seeds, which is
judged at several strengths. From these points: how many ordinary prompts come right where the subject is recognised in
60 % and in 80 % of its pictures, and the area under the curve. Finished rows are kept beside the table, so the command
goes on where it stopped, and several may share the work by ``--methods``. Writes ``adapters.json``, ``.md`` and
``.svg`` into ``benchmarks/results/`` of whatever is finished.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from charts import scatter
from kept import RESULTS, Kept
from personalise import SCORES, SEEDS, Trial, spread

from visiontune import catalogue, config
from visiontune.files import write_json, write_text

SUBJECT, TUNING = "ember", ("mallow", 7)
OTHERS = ("oft_long", "pivotal")  # further recipes of adapters that are among the rest
NAMES = [name.removeprefix("personalise/") for name in catalogue.names("pipelines") if name.startswith("personalise/")]
METHODS = [name for name in NAMES if name not in OTHERS]
# Where the recipe trains more: about as many values as OFT with blocks of 8, as far as a method can.
SIZES = {
    **{name: ["adapter.rank=2"] for name in ("lora", "dora", "mosa", "eva", "corda", "nlora", "allora", "colora")},
    **{"petalface": ["adapter.rank=1"], "plane_oft": ["adapter.rank=2"], "autolora": ["adapter.rank=3"]},
    "loha": ["adapter.options={r: 1}"],
}
FACTORS = tuple(10 ** (k / 2) for k in range(-2, 3))
WEAKER = (0.4, 0.6, 0.8)
LEVELS = (0.6, 0.8)
JUDGED = {"ordinary": 60, "steps": 12}
X, Y = "prompt_accuracy", "subject_known"


def trial(method: str, subject: str, seed: int, lr: float, weaker: Sequence[float] = ()) -> Trial:
    """A run at the sizes of this comparison."""
    options = [f"train.lr={lr:.3g}", "train.checkpoint_every=1000000", *SIZES.get(method, [])]
    return Trial(method, subject, seed, options, label=f"-lr{lr:.3g}", weaker=weaker, sizes=JUDGED)


def rates(method: str) -> list[float]:
    """The rates that are tried: five, around the recipe's."""
    own = config.load_run(f"personalise/{method}", ["name=x"]).train.lr
    return [own * factor for factor in FACTORS]


def merit(row: dict) -> float:
    """Harmonic mean of the subject recognised and of knowledge kept; likeness counts a little where nothing is."""
    learnt = row[Y] + 0.1 * row["subject_oracle"]
    kept = (row[X] + row["class_kept"]) / 2
    return 2 * learnt * kept / max(learnt + kept, 1e-9)


def curve(rows: Sequence[dict], base: dict) -> list[tuple[float, float]]:
    """``(known, prompts right)`` of the base and of every strength, in the mean over runs."""
    strengths = list(rows[0].get("curve") or {"1.0": rows[0]})
    points = [[(r.get("curve") or {"1.0": r})[s] for r in rows] for s in strengths]
    return [(base[Y], base[X]), *((mean(p, Y), mean(p, X)) for p in points)]


def mean(rows: Sequence[dict], score: str) -> float:
    """Of one score."""
    return float(np.mean([row[score] for row in rows]))


def kept_at(points: Sequence[tuple[float, float]], known: float) -> float | None:
    """Most prompts right where the subject is known in this share, between neighbours; none if it never is."""
    found = []
    for (a, kept_a), (b, kept_b) in itertools.pairwise(points):
        if min(a, b) <= known <= max(a, b):
            part = 0.0 if a == b else (known - a) / (b - a)
            found.append(kept_a + part * (kept_b - kept_a))
    return max(found, default=None)


def area(points: Sequence[tuple[float, float]]) -> float:
    """Mean of :func:`kept_at` over shares from 0 to 1, nothing where it is none."""
    return float(np.mean([kept_at(points, known) or 0.0 for known in np.linspace(0, 1, 101)]))


def table(found: dict[str, list[dict]], tried: dict[str, list[dict]], base: dict) -> str:
    """One method a line, the largest area first."""
    head = ["method", "parameters", "rate", "rates tried", "runs", *SCORES]
    head += [f"{X} at {Y} {level}" for level in LEVELS] + ["area", "energy, 1e-5"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    cells = [
        "base",
        "0",
        "",
        "",
        "1",
        *(f"{base[s]:.3f}" for s in SCORES),
        "",
        "",
        f"{area([(0.0, base[X])]):.3f}",
        "0",
    ]
    lines.append("| " + " | ".join(cells) + " |")
    for method in sorted(found, key=lambda m: -area(curve(found[m], base))):
        rows, points = found[method], curve(found[method], base)
        at = [kept_at(points, level) for level in LEVELS]
        energy = [None if r["energy_change"] is None else 1e5 * r["energy_change"] for r in rows]
        cells = [method, f"{rows[0]['parameters']:,}", f"{rows[0]['lr']:.2g}", str(len(tried[method])), str(len(rows))]
        cells += [spread([r[s] for r in rows]) for s in SCORES]
        cells += ["" if kept is None else f"{kept:.3f}" for kept in at] + [f"{area(points):.3f}", spread(energy)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tuned(method: str, kept: Kept, work: Path | None) -> tuple[list[dict], list[dict]]:
    """The final runs of a method and those at the rates that were tried; without ``work``, if all are finished."""

    def row(one: Trial, lr: float) -> dict | None:
        found = one.row(kept, work) if work else kept.find(one.run, one.of)
        return found and {**found, "lr": lr}

    tried = [row(trial(method, *TUNING, lr), lr) for lr in rates(method)]
    if None in tried:
        return [], []
    best = max(tried, key=merit)["lr"]
    final = [row(trial(method, SUBJECT, seed, best, WEAKER), best) for seed in SEEDS]
    return ([], []) if None in final else (final, tried)


def write(kept: Kept, work: Path, out: Path) -> None:
    """The table and the chart of the methods that are finished."""
    base = Trial(None, SUBJECT, 0, sizes=JUDGED).row(kept, work)
    pairs = {method: tuned(method, kept, None) for method in METHODS}
    found = {method: final for method, (final, _) in pairs.items() if final}
    tried = {method: rows for method, (_, rows) in pairs.items() if rows}
    write_json(out / "adapters.json", {"base": base, "runs": found, "rates": tried})
    if found:
        write_text(out / "adapters.md", table(found, tried, base))
        groups = {"base": [(base[X], base[Y])]}
        groups |= {method: [(row[X], row[Y]) for row in rows] for method, rows in found.items()}
        write_text(out / "adapters.svg", scatter(groups, "ordinary prompts right", "subject recognised"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/adapters"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="to share the work")
    parser.add_argument("--table", action="store_true", help="only write what is finished")
    args = parser.parse_args()
    kept = Kept("adapters")
    for method in () if args.table else args.methods:
        tuned(method, kept, args.work)
        write(kept, args.work, args.out)
    write(kept, args.work, args.out)


if __name__ == "__main__":
    main()
