"""Subject learnt against knowledge lost for every adapter of the catalogue, at equal steps and about equal parameters.

    python benchmarks/evidence/adapters.py

One subject, three seeds, the recipes of ``pipelines/personalise`` with ranks of about as many trained values as OFT's
with blocks of 8, and half of their steps. ``RATES`` were found on another subject and seed by one rule for all methods
(``--tune``). Finished runs are kept in ``--work``, so the command goes on where it stopped. Writes ``adapters.json``,
``.md`` and ``.svg`` into ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from charts import scatter
from personalise import RESULTS, SCORES, SEEDS, table, train_and_measure

from visiontune import catalogue
from visiontune.files import write_json, write_text

SUBJECT, TUNING = "ember", ("mallow", 7)
METHODS = [
    name.removeprefix("personalise/") for name in catalogue.names("pipelines") if name.startswith("personalise/")
]
# Where the recipe trains more: about as many values as OFT with blocks of 8, as far as a method can.
SIZES = {
    **{name: ["adapter.rank=2"] for name in ("lora", "dora", "mosa", "eva", "corda", "nlora", "allora", "colora")},
    "petalface": ["adapter.rank=1"],
    "autolora": ["adapter.rank=3"],
    "loha": ["adapter.options={r: 1}"],
}
RATES = {
    **{"allora": 3.2e-3, "autolora": 9.6e-3, "bitfit": 8e-3, "boft": 2.4e-3, "coft": 6.4e-3, "colora": 4.8e-3},
    **{"corda": 6.4e-3, "diablo": 3.2e-3, "dora": 4.8e-3, "eva": 4.8e-3, "full": 2.4e-4, "hft": 4.8e-4},
    **{"loha": 2.4e-3, "loldu": 8e-3, "lora": 4.8e-3, "lora_sb": 1.2e-3, "mos": 6.4e-3, "mosa": 4.8e-3},
    **{"nlora": 8e-4, "oft": 2.4e-3, "one_bit": 4.8e-3, "petalface": 9.6e-3, "r_amt": 4e-5, "s2ft": 6.4e-3},
    **{"sara": 3.2e-3, "spt": 6.4e-3, "ssf": 8e-3, "subtuning": 4.8e-4, "svfit": 8e-3, "triadapt": 4.8e-3},
}
STEPS, SHORT = 200, 160
JUDGED = {"ordinary": 60, "steps": 12}
COLUMNS = (*SCORES, "memorised", "energy, 1e-5")
X, Y = "prompt_accuracy", "subject_known"


def run(method: str | None, subject: str, seed: int, work: Path, lr: float, steps: int = STEPS) -> dict:
    """Scores of one run at the sizes of this comparison."""
    rate = f"{lr:.3g}"
    options = [f"train.steps={steps}", f"train.checkpoint_every={steps}", f"train.lr={rate}"]
    options += SIZES.get(method or "", [])
    row = train_and_measure(method, subject, seed, work, options, label=f"-lr{rate}" if method else "", **JUDGED)
    change = row.pop("energy_change")
    return {**row, "energy, 1e-5": None if change is None else 1e5 * change, "lr": float(rate)}


def merit(row: dict) -> float:
    """Harmonic mean of likeness to the subject and of knowledge kept."""
    likeness = row["subject_oracle"]
    return 2 * row[X] * likeness / (row[X] + likeness)


def tuned(method: str, work: Path) -> float:
    """The best of at most three learning rates on the tuning subject, by one rule for all methods.

    Runs of ``SHORT`` steps, from the rate that is there: four times more while the subject is known in fewer than half
    of the pictures and ordinary prompts do not suffer, a quarter where they suffer most, and between two that fail.
    The long runs get so much less that steps times rate is the same.
    """
    tried: dict[float, float] = {}
    lr, low, high = RATES[method] * STEPS / SHORT, 0.0, 0.0
    for _ in range(3):
        row = run(method, *TUNING, work, lr, SHORT)
        tried[lr] = merit(row)
        if row[X] < 0.5:
            high = lr
        elif row[Y] < 0.5 and row[X] > 0.75:
            low = lr
        else:
            break
        lr = (low * high) ** 0.5 if low and high else lr * 4 if low else lr / 4
    return max(tried, key=tried.__getitem__) * SHORT / STEPS


def chart(rows: list[dict]) -> str:
    """Knowledge kept against the subject learnt."""
    groups = {m: [(row[X], row[Y]) for row in rows if row["method"] == m] for m in ("base", *METHODS)}
    return scatter(
        {m: points for m, points in groups.items() if points}, "ordinary prompts right", "subject recognised"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/adapters"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="to share the work")
    parser.add_argument("--tune", action="store_true", help="look for rates on the tuning subject, and print them")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.tune:
        print({method: tuned(method, args.work) for method in args.methods})
        return
    rows = [run(None, SUBJECT, 0, args.work, 1.0)]
    for seed in SEEDS:
        rows += [run(m, SUBJECT, seed, args.work, RATES[m]) for m in args.methods]
        if args.methods != METHODS:
            continue
        write_json(args.out / "adapters.json", rows)
        write_text(args.out / "adapters.md", table(rows, METHODS, COLUMNS))
        write_text(args.out / "adapters.svg", chart(rows))
    print(table(rows, METHODS, COLUMNS))


if __name__ == "__main__":
    main()
