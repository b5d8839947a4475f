"""What pocket-sd can put together after training for it, and two subjects in one picture, beside what each began from.

    python benchmarks/evidence/bindings.py                   # everything: hours
    python benchmarks/evidence/bindings.py --only plain tokencompose

Three seeds of training; prompts and noise are the same for all. Two tables:

- `bindings`: one and three objects, colours and relations right by the oracle (`visiontune evaluate compose`), of the
  base, of denoising on true scenes (`plain`), and of that with attention taught to stay where objects are
  (`tokencompose`), with as many steps;
- `together`: two subjects (bumble and domino) learnt in one run (`subjects`), by words' keys and values alone
  (`custom_diffusion`), and each by itself with both adapters on top of each other: LoRAs (`apart`), rotations, which
  multiply (`rotated`), and LoRAs of two slots of one basis (`orthogonal`). How often both are known, and how often
  their looks mix.

Finished rows are kept beside the tables, so the command goes on where it stopped. Learning rates are those of the
recipes; none was chosen on these seeds. Writes ``bindings.json`` and ``bindings.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from kept import RESULTS, Kept, told

from visiontune import adapters, config
from visiontune.assemble import assemble
from visiontune.evaluation import compose, compose_pocket, together
from visiontune.files import write_json, write_text
from visiontune.models import load

SEEDS = (1, 2, 3)
CATEGORIES = ("one", "three", "colour", "spatial")
COUNT, STEPS = 50, 25
PLAIN = ["objective.token_weight=0", "objective.pixel_weight=0"]
BINDINGS = {"plain": PLAIN, "tokencompose": []}
TRIGGERS = {"bumble": "sks", "domino": "zwx"}
QUIET = ["preview.prompts=[]", "judge=none", "train.trackers=[]"]
# The runs whose adapters lie on top of each other, each with the options of its subject.
APART = [[f"data.root=pocket/{subject}", f"data.trigger={word}"] for subject, word in TRIGGERS.items()]
TOGETHER: dict[str, list[tuple[str, list[str]]]] = {
    "subjects": [("compose/subjects", [])],
    "custom_diffusion": [("compose/custom_diffusion", [])],
    "apart": [("personalise/lora", options) for options in APART],
    "rotated": [("personalise/oft", options) for options in APART],
    "orthogonal": [("compose/apart", [*options, f"adapter.slot={i}"]) for i, options in enumerate(APART)],
}


def trained(runs: Sequence[tuple[str, Sequence[str]]], seed: int, work: Path) -> Any:
    """pocket-sd with the adapters of some runs of recipes on top of each other."""
    model: Any = load("pocket/sd")
    for i, (recipe, options) in enumerate(runs):
        run = config.load_run(recipe, [f"out={work}", f"name=run{i}", f"seed={seed}", *QUIET, *options])
        shutil.rmtree(run.folder, ignore_errors=True)
        file = assemble(run).fit()
        adapters.load(model.networks(), file, name=f"run{i}").eval()
        shutil.rmtree(run.folder, ignore_errors=True)
    return model


def put_together(model: Any) -> dict[str, float]:
    """Shares of pictures that are right, by category."""
    tasks = [task for task in compose_pocket.tasks(COUNT) if task.category in CATEGORIES]
    report = compose.evaluate(model, tasks, compose_pocket.Oracle(), steps=STEPS)
    return {row.category: row.right for row in report.rows}


def side_by_side(model: Any) -> dict[str, float]:
    """How well two subjects are known, and how much they mix."""
    return together.measure(model, TRIGGERS, steps=STEPS).scores()


def rows(
    table: str,
    methods: dict[str, Sequence[tuple[str, Sequence[str]]]],
    judge: Callable[[Any], dict[str, float]],
    only: Sequence[str],
    work: Path,
) -> list[dict]:
    """Of the base, and of every method and seed, what the judge finds; those not asked for where they are known."""
    kept, found = Kept(table), []

    def made(runs: list, seed: int) -> dict:
        return judge(trained(runs, seed, work))

    for name, runs in {"base": [], **methods}.items():
        for seed in SEEDS if runs else (0,):
            of = [[told(recipe, options) for recipe, options in runs], COUNT, STEPS]
            label = f"{name}-{seed}"
            make = partial(made, runs, seed)
            row = kept.row(label, of, make) if name in only else kept.find(label, of)
            found += [{"method": name, "seed": seed, **row}] if row else []
    return found


def table(found: list[dict]) -> str:
    """Mean and standard deviation over seeds, one method a line."""
    scores = [name for name in found[0] if name not in ("method", "seed")]
    lines = [f"| method | runs | {' | '.join(scores)} |", "|---" * (2 + len(scores)) + "|"]
    for method in dict.fromkeys(row["method"] for row in found):
        own = [row for row in found if row["method"] == method]
        cells = [f"{np.mean([r[s] for r in own]):.3f} ± {np.std([r[s] for r in own]):.3f}" for s in scores]
        lines.append(f"| {method} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["base", *BINDINGS, *TOGETHER]
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/bindings"))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="the tables have whatever is finished")
    args = parser.parse_args()
    bound = {name: [("compose/tokencompose", options)] for name, options in BINDINGS.items()}
    found = {
        "bindings": rows("bindings", bound, put_together, args.only, args.work),
        "together": rows("together", TOGETHER, side_by_side, args.only, args.work),
    }
    text = "\n".join(f"## {name}\n\n{table(own)}" for name, own in found.items() if own)
    write_json(RESULTS / "bindings.json", found)
    write_text(RESULTS / "bindings.md", text)
    print(text)


if __name__ == "__main__":
    main()
