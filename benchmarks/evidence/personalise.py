"""Subject learnt against knowledge lost: LoRA, OFT (also at length) and full fine-tuning, on pocket-sd.

    python benchmarks/evidence/personalise.py

Three subjects, three seeds, the catalogue's recipes as they are, a hundred ordinary prompts in 25 DDIM steps. Their
learning rates were chosen on another subject and another seed (``--tune oft,train.lr=1e-2``), never on these.
Finished rows are kept beside the table, so the command goes on where it stopped. Writes
``benchmarks/results/personalise.json`` and ``personalise.md``.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from kept import RESULTS, Kept, told

from visiontune import config
from visiontune.assemble import assemble
from visiontune.data.readers import read
from visiontune.errors import UserError
from visiontune.evaluation.metrics import hyperspherical_energy
from visiontune.evaluation.personalise import measure
from visiontune.files import write_json, write_text
from visiontune.models import load
from visiontune.models.diffusion import DiffusionModel
from visiontune.training.loop import Trainer

# Recipe and options. The trigger alone is what LoRA and OFT have beside the adapter, which does not move at this rate.
METHODS: dict[str, tuple[str, list[str]]] = {
    "lora": ("lora", []),
    "oft": ("oft", []),
    "oft_long": ("oft_long", []),
    "full": ("full", []),
    "trigger": ("lora", ["train.lr=1e-9"]),
}
SUBJECTS = ("bumble", "domino", "lagoon")
SEEDS = (0, 1, 2)
TUNING = ("mallow", 7)
JUDGED = {"ordinary": 100, "steps": 25}
SCORES = ("subject_oracle", "subject_known", "subject_composed", "subject_clip", "prompt_accuracy", "class_kept")


@dataclass(frozen=True)
class Trial:
    """A run of a recipe on a subject.

    Attributes:
        method: the recipe's name; None measures the base model.
        options: on top of it.
        name: what the row calls it, where that is not the recipe's name.
        label: tells runs with other options apart.
        weaker: strengths of the adapter at which it is judged too; the scores are the row's ``curve``.
        sizes: those of ``measure``.
    """

    method: str | None
    subject: str
    seed: int
    options: Sequence[str] = ()
    name: str = ""
    label: str = ""
    weaker: Sequence[float] = ()
    sizes: Mapping[str, int] = field(default_factory=lambda: JUDGED)

    @property
    def called(self) -> str:
        """The name in the row."""
        return self.name or self.method or "base"

    @property
    def run(self) -> str:
        """The name of the run."""
        return f"{self.called}{self.label}-{self.subject}-{self.seed}"

    @property
    def of(self) -> list:
        """What its scores depend on, beside the code."""
        return [told(f"personalise/{self.method}", self.options) if self.method else None, self.weaker, self.sizes]

    def row(self, kept: Kept, work: Path) -> dict:
        """Its scores; trained and measured in the folder ``work`` unless they are known."""
        return kept.row(self.run, self.of, lambda: self.measured(work))

    def measured(self, work: Path) -> dict:
        """Train and measure it."""
        own = [f"out={work}", f"name={self.run}", f"seed={self.seed}", f"data.root=pocket/{self.subject}"]
        quiet = ["preview.prompts=[]", "judge=none"]
        recipe = config.load_run(f"personalise/{self.method or 'lora'}", [*own, *quiet, *self.options])
        base = load(recipe.model.source)
        before = energies(base)
        references = np.stack([np.asarray(sample.sources["image"].open()) for sample in read(recipe.data)])
        trainer, model, trained = None, base, 0
        if self.method:
            shutil.rmtree(recipe.folder, ignore_errors=True)
            trainer = assemble(recipe)
            trainer.fit()
            model = trainer.model
            trained = sum(p.numel() for p in trainer.parameters.values())
            shutil.rmtree(recipe.folder, ignore_errors=True)
        curve = {}
        adapters = None if trainer is None else trainer.adapters
        for strength in (1.0,) if adapters is None else (*self.weaker, 1.0):
            if adapters is not None:
                adapters.scale = strength
            curve[strength] = measure(model, self.subject, recipe.data.trigger, references, **self.sizes).scores()
        row = {"method": self.called, "subject": self.subject, "seed": self.seed, "parameters": trained, **curve[1.0]}
        if self.weaker:
            row["curve"] = {str(strength): {s: scores[s] for s in SCORES} for strength, scores in curve.items()}
        return {**row, "energy_change": 0.0 if trainer is None else energy_change(trainer, before)}


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
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="only run these; the table has whatever is finished",
    )
    parser.add_argument(
        "--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS, help="only these, to share the work"
    )
    parser.add_argument("--tune", nargs="+", metavar="METHOD[,OVERRIDE]", help="try options on the tuning subject only")
    args = parser.parse_args()
    if args.tune:
        for trial in args.tune:
            method, *options = trial.split(",")
            Trial(method, *TUNING, options, label="-".join(["", *options])).row(Kept("personalise_tuning"), args.work)
        return
    kept = Kept("personalise")
    rows = [Trial(None, subject, 0).row(kept, args.work) for subject in SUBJECTS]
    for seed, subject, (method, (recipe, options)) in itertools.product(SEEDS, SUBJECTS, METHODS.items()):
        trial = Trial(recipe, subject, seed, options, method)
        wanted = method in args.methods and subject in args.subjects
        row = trial.row(kept, args.work) if wanted else kept.find(trial.run, trial.of)
        rows += [row] if row else []
    write_json(args.out / "personalise.json", rows)
    write_text(args.out / "personalise.md", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
