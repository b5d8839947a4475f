"""Reward tuning on pocket-sd: what is gained on unseen prompts, for how many queries and how much time, at what cost.

    python benchmarks/evidence/rewards.py

Every method has the same LoRA on what it tunes, five sampling steps, no guidance, and a learning rate that was chosen
of three or more by the reward on a seed of its own (``--pilot``). Methods that see only scores get twice the processor
time of those that see gradients. The reward is pocket-clip plus five times redness: both pull, one past what the prompt
says. Unseen prompts are drawn by the stock pipeline and judged by both terms and by the oracle, which no method sees.
DDPO and PRDP also raise redness alone, on 400 prompts and on few.

Then redness alone is raised, the quickest way to ruin a model, and guards that see other prompts and the oracle look
after every update: do they stop the run before a tenth of the unseen prompts is lost? And do they keep silent where
pocket-clip is raised, which helps? The bound of their reward was set on runs with other seeds.

Finished rows are kept beside the tables. Writes ``rewards`` and ``rewards_alarm``, ``.json`` and ``.md``, and
``rewards.svg`` into ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from charts import curves
from kept import RESULTS, Kept, told

from visiontune import config
from visiontune.assemble import assemble
from visiontune.data.base import Config as Data
from visiontune.data.prompts import read_data_prompts
from visiontune.evaluation.metrics import prompt_accuracy
from visiontune.evaluation.personalise import ordinary_prompts
from visiontune.files import write_json, write_text
from visiontune.models import load
from visiontune.models.diffusion import DiffusionModel
from visiontune.ops.pixels import to_tensor
from visiontune.rewards.loading import load as load_reward
from visiontune.sampling.pipeline import images
from visiontune.training.loop import Trainer

SEEDS, PILOT = (0, 1, 2), 7
TERMS = {"redness": 5.0, "pocket-clip": 1.0}
PATHWISE, BLIND, LOOKS = 80.0, 160.0, 5
PROMPTS = ordinary_prompts(60)
FEW, RATE, MOST_RATES = 8, 2e-3, 5
STEPS, ALARM_STEPS = 5, 10
COMMON = [
    "adapter={name: lora, targets: attention, rank: 4}",
    f"reward={{name: mix, terms: [{', '.join(f'{{reward: {name}, weight: {w}}}' for name, w in TERMS.items())}]}}",
    f"objective.steps={STEPS}",
    "objective.cfg_scale=1",
    "preview.prompts=[]",
    "train.trackers=[]",
    "train.steps=8000",
]
BATCH = ["train.batch_size=32", "objective.micro_batch=32", "objective.group=8"]
HALF, ONCE = [*BATCH, "objective.timestep_fraction=0.6"], [*BATCH, "objective.updates=1"]
TEXT = ["train.parts=[text]"]
RED = "reward=redness"
# What is raised under guards, learning rate, updates between two checks, seeds.
RAISED = (("redness", 4e-3, 1, (3, 4, 5)), ("redness", 2e-3, 1, (3, 4, 5)), ("pocket-clip", 2e-3, 4, (3, 4)))
# Recipe, options, learning rate.
METHODS: dict[str, tuple[str, list[str], float]] = {
    "AlignProp": ("alignprop", [], 6e-3),
    "DRaFT-1": ("alignprop", ["objective.truncation=fixed", "objective.grad_steps=1"], 6e-3),
    "ReFL": ("refl", [], 2e-3),
    "DDPO": ("ddpo", HALF, 6e-3),
    "PRDP": ("prdp", ONCE, 6e-3),
    "NFT": ("nft", [*BATCH, "objective.timestep_count=3"], 2e-3),
    "TextCraftor": ("alignprop", TEXT, 2e-3),
    "AlignProp, both": ("alignprop", ["train.parts=[denoiser, text]", "train.part_lr={text: 6e-3}"], 6e-3),
    "TexForce": ("ddpo", [*HALF, *TEXT], 6e-3),
    "DDPO, redness": ("ddpo", [*HALF, RED], 2e-3),
    "PRDP, redness": ("prdp", [*ONCE, RED], 2e-3),
    f"DDPO, redness, {FEW} prompts": ("ddpo", [*HALF, RED], 2e-3),
    f"PRDP, redness, {FEW} prompts": ("prdp", [*ONCE, RED], 2e-3),
}
SCORES = ("reward", *TERMS, "oracle")


@cache
def prompts(method: str, work: Path) -> str:
    """What is trained on: 400 captions, or the first few of them."""
    if not method.endswith(f" {FEW} prompts"):
        return "pocket/prompts"
    few = work / "few.txt"
    write_text(few, "\n".join(read_data_prompts(Data(root="pocket/prompts"))[:FEW]) + "\n")
    return str(few)


def seconds(method: str) -> float:
    """Processor time of a run."""
    return PATHWISE if METHODS[method][0] in ("alignprop", "refl") else BLIND


judge = cache(load_reward)


def look(model: DiffusionModel, steps: int = STEPS) -> dict[str, float]:
    """Mean scores on the unseen prompts."""
    with torch.no_grad():
        drawn = images(model, PROMPTS, [0] * len(PROMPTS), batch_size=len(PROMPTS), steps=steps, cfg_scale=1.0)
    meta = [{"prompt_id": i} for i in range(len(PROMPTS))]
    found = {name: float(judge(name)(to_tensor(drawn), PROMPTS, meta).mean()) for name in TERMS}
    reward = sum(weight * found[name] for name, weight in TERMS.items())
    return {"reward": reward, **found, "oracle": prompt_accuracy(drawn, PROMPTS)}


class Counted:
    """A reward that counts the pictures it has scored."""

    def __init__(self, reward: Any) -> None:
        self.reward, self.queries = reward, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reward, name)

    def __call__(self, pictures: torch.Tensor, *args: Any) -> torch.Tensor:
        self.queries += len(pictures)
        return self.reward(pictures, *args)


def trainer_of(recipe: str, name: str, seed: int, work: Path, lr: float, options: Sequence[str]) -> Trainer:
    """A run from its beginning; what an interrupted one left is removed."""
    shutil.rmtree(work / name, ignore_errors=True)
    own = [f"out={work}", f"name={name}", f"seed={seed}", f"train.lr={lr}"]
    return assemble(config.load_run(f"reward_tune/{recipe}", [*COMMON, *options, *own]))


@dataclass(frozen=True)
class Course:
    """A run that is looked at on its way.

    Attributes:
        method: what its rows call it.
        recipe: of ``reward_tune``.
        options: on top of it and of ``COMMON``.
        until: processor time of training, s.
        looks: how often :func:`look` looks, at equally spaced times; once more at the start.
    """

    method: str
    recipe: str
    options: Sequence[str]
    seed: int
    lr: float
    until: float
    looks: int = LOOKS

    def rows(self, kept: Kept, work: Path) -> list[dict[str, Any]]:
        """Its looks; run in the folder ``work`` unless they are known."""
        of = [told(f"reward_tune/{self.recipe}", [*COMMON, *self.options]), self.until, self.looks]
        name = f"{self.method.replace(', ', '-').replace(' ', '-')}-{self.seed}-{self.lr:.3g}"
        return kept.row(name, of, lambda: self.run(name, work))

    def run(self, name: str, work: Path) -> list[dict[str, Any]]:
        """Train and look."""
        trainer = trainer_of(self.recipe, name, self.seed, work, self.lr, self.options)
        updates = trainer.objective.updates
        counted = trainer.lender.reward = Counted(trainer.lender.reward)
        rows, spent, step = [], 0.0, 0
        while True:
            # A rollout serves several steps: it is looked at between rollouts only.
            if spent >= self.until * len(rows) / self.looks:
                at = {"method": self.method, "seed": self.seed, "lr": self.lr, "seconds": spent}
                rows.append({**at, "queries": counted.queries, "steps": step, **look(trainer.model)})
                print(json.dumps(rows[-1]), flush=True)
            if spent >= self.until:
                return rows
            for _ in range(updates):
                begun = time.process_time()
                trainer.optimise(step)
                spent, step = spent + time.process_time() - begun, step + 1


def of_table(method: str, seed: int, work: Path, lr: float, until: float, looks: int = LOOKS) -> Course:
    """The run of a method of the table."""
    recipe, options, _ = METHODS[method]
    return Course(method, recipe, [*options, f"data={prompts(method, work)}"], seed, lr, until, looks)


def pilot(method: str, kept: Kept, work: Path) -> None:
    """Learning rates for a method of the table, for 40 s, or 100 s where only scores are seen."""
    until = 40.0 if seconds(method) == PATHWISE else 100.0
    sought(lambda lr: of_table(method, PILOT, work, lr, until, 1).rows(kept, work))


def sought(run: Callable[[float], list[dict[str, Any]]]) -> float:
    """The best of three learning rates by the reward at a run's end, and of higher ones while the highest is best."""
    ends: dict[float, float] = {}
    rates = [RATE / 3, RATE, RATE * 3]
    while rates:
        lr = float(f"{rates.pop(0):.1g}")
        ends[lr] = run(lr)[-1]["reward"]
        if not rates and max(ends, key=ends.__getitem__) == lr and len(ends) < MOST_RATES:
            rates.append(3 * lr)
    return max(ends, key=ends.__getitem__)


def alarm(raised: str, lr: float, every: int, seed: int, work: Path) -> list[dict[str, Any]]:
    """What guards say while a reward is raised, until a fifth of the unseen prompts is lost or 40 updates are done."""
    trainer = trainer_of("alignprop", f"alarm-{raised}-{lr:.3g}-{seed}", seed, work, lr, guarded(raised, every))
    guard, model, rows = trainer.guard, trainer.model, []
    assert guard is not None
    for step in range(0, 41, every):
        with torch.no_grad():
            pictures = guard.draw(model)
        broken = guard.check(step, guard.measure(pictures, trainer.out, trainer.adapters, model.device))
        if not step:
            guard.keep(trainer.out, 0, pictures)
        measured = {f"guard/{name}": value for name, value in guard.latest.items()}
        at = {"raised": raised, "lr": lr, "seed": seed, "step": step, "alarms": [b.measure for b in broken]}
        rows.append({**at, **measured, **look(model, ALARM_STEPS)})
        print(json.dumps(rows[-1]), flush=True)
        if step == 40 or rows[-1]["oracle"] <= 0.8 * rows[0]["oracle"]:
            break
        for update in range(step, step + every):
            trainer.optimise(update)
    return rows


def guarded(raised: str, every: int) -> list[str]:
    """Options of a run under guards that see other prompts and the oracle."""
    guards = f"guards={{every: {every}, reward: pocket-oracle, holdout: 32, seeds: [0, 1], steps: {ALARM_STEPS}}}"
    return ["adapter.rank=8", f"objective.steps={ALARM_STEPS}", f"reward={raised}", guards, "guards.cfg_scale=1"]


def alarms(kept: Kept, work: Path) -> list[list[dict[str, Any]]]:
    """Every run under guards."""
    runs = []
    for raised, lr, every, seeds in RAISED:
        for seed in seeds:
            of = [told("reward_tune/alignprop", [*COMMON, *guarded(raised, every)]), lr, ALARM_STEPS]
            run = partial(alarm, raised, lr, every, seed, work)
            runs.append(kept.row(f"alarm-{raised}-{lr:.3g}-{seed}", of, run))
    return runs


def alarm_table(runs: list[list[dict[str, Any]]]) -> str:
    """The first alarm of each run, what was lost by then, and how the run went on without it."""
    heads = ("raised", "rate", "seed", "first alarm", "its measure", "oracle then", "oracle at first", "at the end")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run in runs:
        first = next((row for row in run if row["alarms"]), None)
        rung = [str(first["step"]), ", ".join(first["alarms"]), f"{first['oracle']:.3f}"] if first else ["none", "", ""]
        ends = [f"{run[0]['oracle']:.3f}", f"{run[-1]['oracle']:.3f} after {run[-1]['step']}"]
        what = [run[0]["raised"], f"{run[0]['lr']:g}", str(run[0]["seed"])]
        lines.append(f"| {' | '.join([*what, *rung, *ends])} |")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Scores at the end, the largest fall on the way of what a method raises, and what was spent."""
    heads = ("method", "rate", "runs", "seconds", "queries", "updates", *SCORES, "largest fall of what is raised")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method, runs in by_method(rows).items():
        ends = [run[-1] for run in runs]
        cells = [f"{np.mean([e[s] for e in ends]):.3f} ± {np.std([e[s] for e in ends]):.3f}" for s in SCORES]
        spent = [f"{np.mean([e[k] for e in ends]):.0f}" for k in ("seconds", "queries", "steps")]
        rate = f"{ends[0]['lr']:g}" if "lr" in ends[0] else ""
        raised = "redness" if "redness" in method else "reward"
        fall = max(max(r[raised] for r in run[: i + 1]) - at[raised] for run in runs for i, at in enumerate(run))
        lines.append(f"| {method} | {rate} | {len(runs)} | {' | '.join([*spent, *cells])} | {fall:.3f} |")
    return "\n".join(lines) + "\n"


def by_method(rows: list[dict[str, Any]]) -> dict[str, list[list[dict[str, Any]]]]:
    """The runs of each method, each a list of its looks."""
    runs = {
        method: [[r for r in rows if (r["method"], r["seed"]) == (method, seed)] for seed in SEEDS]
        for method in ("base", *METHODS)
    }
    return {method: found for method, of_seeds in runs.items() if (found := [run for run in of_seeds if run])}


def chart(rows: list[dict[str, Any]]) -> str:
    """Reward and oracle against processor time, and reward against queries, of the methods on 400 prompts."""
    runs = {m: r for m, r in by_method(rows).items() if m != "base" and "redness" not in m}
    panels = (
        ("processor time, s", "reward", "seconds", "reward"),
        ("pictures scored", "reward", "queries", "reward"),
        ("processor time, s", "unseen prompts right", "seconds", "oracle"),
    )
    return curves(
        [(x, y, {m: [[(e[a], e[b]) for e in run] for run in of] for m, of in runs.items()}) for x, y, a, b in panels]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/rewards"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="to share the work")
    parser.add_argument("--pilot", action="store_true", help="learning rates, on a seed of their own")
    parser.add_argument("--alarm", action="store_true", help="the guards' part alone")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    kept = Kept("rewards")
    if args.pilot:
        for method in args.methods:
            pilot(method, kept, args.work)
        return
    whole = args.methods == list(METHODS)
    if not args.alarm:
        rows: list[dict[str, Any]] = [
            {"method": "base", "seed": 0, "seconds": 0.0, "queries": 0, "steps": 0, **look(load("pocket/sd"))}
        ]
        for seed in SEEDS:
            for method in args.methods:
                course = of_table(method, seed, args.work, METHODS[method][2], seconds(method))
                rows += course.rows(kept, args.work)
            if whole:
                write_json(args.out / "rewards.json", rows)
                write_text(args.out / "rewards.md", table(rows))
                write_text(args.out / "rewards.svg", chart(rows))
        print(table(rows))
    if whole:
        runs = alarms(kept, args.work)
        write_json(args.out / "rewards_alarm.json", [row for run in runs for row in run])
        write_text(args.out / "rewards_alarm.md", alarm_table(runs))
        print(alarm_table(runs))


if __name__ == "__main__":
    main()
