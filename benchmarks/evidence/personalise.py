"""Subject learnt against knowledge lost: LoRA, OFT and full fine-tuning, on pocket-sd.

    python benchmarks/evidence/personalise.py

Three subjects, three seeds, the catalogue's recipes as they are, a hundred ordinary prompts in 25 DDIM steps. Their
learning rates were chosen on another subject and another seed (``--tune oft,train.lr=1e-2``), never on these.
Finished runs are kept in ``--work``, so the command goes on where it stopped. Writes
``benchmarks/results/personalise.json`` and ``personalise.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from visiontune import config
from visiontune.assemble import assemble
from visiontune.data.readers import read
from visiontune.errors import UserError
from visiontune.evaluation.metrics import hyperspherical_energy
from visiontune.evaluation.personalise import measure
from visiontune.files import write_json
from visiontune.models import load
from visiontune.models.diffusion import DiffusionModel
from visiontune.training.loop import Trainer

# Recipe and options. The trigger alone is what LoRA and OFT have beside the adapter, which does not move at this rate.
METHODS: dict[str, tuple[str, list[str]]] = {
    "lora": ("lora", []),
    "oft": ("oft", []),
    "full": ("full", []),
    "trigger": ("lora", ["train.lr=1e-9"]),
}
SUBJECTS = ("bumble", "domino", "lagoon")
SEEDS = (0, 1, 2)
TUNING = ("mallow", 7)
RESULTS = Path(__file__).parents[1] / "results"
JUDGED = {"ordinary": 100, "steps": 25}
SCORES = ("subject_oracle", "subject_known", "subject_composed", "subject_clip", "prompt_accuracy", "class_kept")


def train_and_measure(
    method: str | None,
    subject: str,
    seed: int,
    work: Path,
    overrides: list[str],
    label: str = "",
    *,
    name: str = "",
    weaker: Sequence[float] = (),
    **sizes: int,
) -> dict:
    """Scores of one run of the recipe ``method``; None measures the base model.

    ``label`` tells runs with other overrides apart, or ``name`` says what they are. At ``weaker`` strengths of an
    adapter it is judged too, and their scores are the row's ``curve``; ``sizes`` are those of ``measure``.
    """
    name = name or method or "base"
    run = f"{name}{label}-{subject}-{seed}"
    file = work / f"{run}.json"
    if file.exists():
        return json.loads(file.read_text())
    own = [
        f"out={work}",
        f"name={run}",
        f"seed={seed}",
        f"data.root=pocket/{subject}",
        "preview.prompts=[]",
    ]
    recipe = config.load_run(f"personalise/{method or 'lora'}", [*own, *overrides])
    base = load(recipe.model.source)
    before = energies(base)
    references = np.stack([np.asarray(sample.sources["image"].open()) for sample in read(recipe.data)])
    trainer = None
    if method is None:
        model, trained = base, 0
    else:
        shutil.rmtree(recipe.folder, ignore_errors=True)
        trainer = assemble(recipe)
        trainer.fit()
        model = trainer.model
        trained = sum(p.numel() for p in trainer.parameters.values())
        shutil.rmtree(recipe.folder, ignore_errors=True)
    curve = {}
    adapters = None if trainer is None else trainer.adapters
    for strength in (1.0,) if adapters is None else (*weaker, 1.0):
        if adapters is not None:
            adapters.scale = strength
        curve[strength] = measure(model, subject, recipe.data.trigger, references, **sizes).scores()
    row = {"method": name, "subject": subject, "seed": seed, "parameters": trained, **curve[1.0]}
    if weaker:
        row["curve"] = {str(strength): {s: scores[s] for s in SCORES} for strength, scores in curve.items()}
    row["energy_change"] = 0.0 if trainer is None else energy_change(trainer, before)
    write_json(file, row)
    print(json.dumps(row), flush=True)
    return row


def energy_change(trainer: Trainer, before: dict[str, float]) -> float | None:
    """Mean relative change of the layers' energies; the trained weights are merged, where one weight can hold them."""
    try:
        if trainer.adapters is not None:
            trainer.adapters.merge()
    except UserError:
        return None
    after = energies(trainer.model)
    return round(float(np.mean([abs(after[name] / energy - 1) for name, energy in before.items() if name in after])), 5)


def energies(model: DiffusionModel) -> dict[str, float]:
    """Hyperspherical energy of every linear layer and convolution in which two rows or more are left."""
    layers = {f"{c}.{n}": m for c, root in model.networks().items() for n, m in root.named_modules()}
    weights = {n: m.weight for n, m in layers.items() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    kept = {n: w for n, w in weights.items() if int(w.flatten(1).any(1).sum()) > 1}
    return {name: hyperspherical_energy(weight) for name, weight in kept.items()}


def table(rows: list[dict], methods: Iterable[str] = METHODS, scores: Sequence[str] = SCORES) -> str:
    """Mean and standard deviation over runs, one method a line."""
    lines = ["| method | parameters | runs | " + " | ".join(scores) + " |", "|---" * (3 + len(scores)) + "|"]
    for method in ("base", *methods):
        own = [row for row in rows if row["method"] == method]
        if own:
            cells = [spread([r[s] for r in own]) for s in scores]
            lines.append(f"| {method} | {own[0]['parameters']:,} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation; nothing where there is no number."""
    numbers = [value for value in values if value is not None]
    return f"{np.mean(numbers):.3f} ± {np.std(numbers):.3f}" if numbers else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/personalise"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, help="only run these; the table has whatever is finished"
    )
    parser.add_argument(
        "--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS, help="only these, to share the work"
    )
    parser.add_argument("--tune", nargs="+", metavar="METHOD[,OVERRIDE]", help="try options on the tuning subject only")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.tune:
        for trial in args.tune:
            method, *overrides = trial.split(",")
            work = args.work / "-".join(["tune", *overrides])
            work.mkdir(exist_ok=True)
            train_and_measure(method, *TUNING, work, overrides, **JUDGED)
        return
    for subject in args.subjects:
        train_and_measure(None, subject, 0, args.work, [], **JUDGED)
    for seed, subject, method in itertools.product(SEEDS, args.subjects, args.methods or METHODS):
        recipe, options = METHODS[method]
        train_and_measure(recipe, subject, seed, args.work, options, name=method, **JUDGED)
    rows = [json.loads(file.read_text()) for file in sorted(args.work.glob("*.json"))]
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "personalise.json", rows)
    (args.out / "personalise.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
