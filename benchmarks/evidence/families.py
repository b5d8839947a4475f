"""The same methods on pocket-sd and on pocket-flow: what a subject costs, and what reward tuning gains.

    python benchmarks/evidence/families.py

Personalisation by the catalogue's LoRA recipe, three subjects with a seed each; reward tuning by AlignProp, Flow-GRPO
and PRDP, three seeds, the same processor time on both models. Learning rates are sought for each method on each model,
on a subject and a seed that are not reported, by the reward, or by the mean of what is learnt and what is kept. The
reward, the unseen prompts and the budget of reward tuning are those of ``rewards.py``. Finished rows are kept
beside the table. Writes ``families.json``, ``.md`` and ``.svg`` into ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from charts import curves
from kept import RESULTS, Kept
from personalise import SUBJECTS, TUNING, Trial, spread

from rewards import HALF, LOOKS, ONCE, PILOT, SCORES, SEEDS, Course, sought
from visiontune.files import write_json, write_text

SECONDS = 160.0
# How pictures are drawn where their probability counts.
DYNAMICS = {"pocket/sd": "{name: ddim, eta: 1.0}", "pocket/flow": "{name: flow-sde, eta: 0.7}"}
REWARDED: dict[str, tuple[str, list[str]]] = {
    "AlignProp": ("alignprop", []),
    "Flow-GRPO": ("grpo", HALF),
    "PRDP": ("prdp", ONCE),
}
RATES = (2e-3, 4e-3, 6e-3, 1e-2)
LEARNT = ("subject_known", "prompt_accuracy", "class_kept")


def rewarded(kept: Kept, work: Path) -> Iterator[dict[str, Any]]:
    """Every look at every run of reward tuning."""
    for model, dynamics in DYNAMICS.items():
        for method, (recipe, options) in REWARDED.items():
            own = [*options, f"model={model}", "data=pocket/prompts"]
            if options:
                own.append(f"objective.dynamics={dynamics}")
            name = f"{method}, {model}"

            def run(lr: float, seed: int = PILOT, looks: int = 1, name=name, recipe=recipe, own=own) -> list[dict]:
                until = SECONDS if seed != PILOT else SECONDS / 2
                return Course(name, recipe, own, seed, lr, until, looks).rows(kept, work)

            rate = sought(run)
            for seed in SEEDS:
                yield from run(rate, seed, LOOKS)


def personalised(kept: Kept, work: Path) -> Iterator[dict[str, Any]]:
    """The base and the recipe on three subjects, with the rate that did best on another."""
    for model in DYNAMICS:

        def run(subject: str, seed: int, lr: float, model=model) -> dict[str, Any]:
            options = [f"model={model}", f"train.lr={lr}"]
            return Trial("lora", subject, seed, options, f"lora {model.replace('/', '-')} {lr:g}").row(kept, work)

        tried = {lr: run(*TUNING, lr) for lr in RATES}
        rate = max(tried, key=lambda lr: sum(tried[lr][score] for score in LEARNT))
        for subject, seed in zip(SUBJECTS, SEEDS, strict=True):
            base = Trial(None, subject, seed, [f"model={model}"], f"base {model.replace('/', '-')}").row(kept, work)
            yield {**base, "method": "base", "model": model, "lr": None}
            yield {**run(subject, seed, rate), "method": "lora", "model": model, "lr": rate}


def table(learnt: list[dict[str, Any]], raised: list[dict[str, Any]]) -> str:
    """Means and standard deviations over runs, one method and model a line."""
    lines = [f"| model | personalised by | rate | runs | {' | '.join(LEARNT)} |", "|---" * (4 + len(LEARNT)) + "|"]
    for model in DYNAMICS:
        for method in ("base", "lora"):
            own = [row for row in learnt if (row["model"], row["method"]) == (model, method)]
            rate = f"{own[0]['lr']:g}" if own[0]["lr"] else ""
            cells = [spread([row[score] for row in own]) for score in LEARNT]
            lines.append(f"| {model} | {method} | {rate} | {len(own)} | {' | '.join(cells)} |")
    heads = ("method, model", "rate", "runs", "queries", "updates", *(f"{s}: first, last" for s in SCORES))
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method, runs in by_method(raised).items():
        ends = [run[-1] for run in runs]
        spent = [f"{np.mean([end[k] for end in ends]):.0f}" for k in ("queries", "steps")]
        cells = [f"{np.mean([run[0][s] for run in runs]):.3f}, {spread([end[s] for end in ends])}" for s in SCORES]
        lines.append(f"| {method} | {ends[0]['lr']:g} | {len(runs)} | {' | '.join([*spent, *cells])} |")
    return "\n".join(lines) + "\n"


def by_method(rows: list[dict[str, Any]]) -> dict[str, list[list[dict[str, Any]]]]:
    """The runs of each method on each model, each a list of its looks."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(row["seed"], []).append(row)
    return {method: list(runs.values()) for method, runs in found.items()}


def chart(rows: list[dict[str, Any]]) -> str:
    """Reward and oracle against processor time."""
    runs = by_method(rows)
    panels = (("reward", "reward"), ("unseen prompts right", "oracle"))
    return curves(
        [
            (
                "processor time, s",
                label,
                {m: [[(at["seconds"], at[score]) for at in run] for run in of] for m, of in runs.items()},
            )
            for label, score in panels
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/families"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    kept = Kept("families")
    learnt, raised = list(personalised(kept, args.work)), list(rewarded(kept, args.work))
    write_json(args.out / "families.json", {"personalised": learnt, "rewarded": raised})
    write_text(args.out / "families.md", table(learnt, raised))
    write_text(args.out / "families.svg", chart(raised))
    print(table(learnt, raised))


if __name__ == "__main__":
    main()
