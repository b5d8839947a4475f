"""Reward tuning on pocket-sd: what is gained on unseen prompts, for how many queries and how much time, at what cost.

    python benchmarks/evidence/rewards.py

Every method has the same LoRA, sampler length and processor time, no guidance, and a learning rate that was chosen of
three on a seed of its own (``--pilot``). The reward is pocket-clip plus redness: both pull, one against what the prompt
says. Unseen prompts are drawn by the stock pipeline and judged by both terms and by the oracle, which no method sees.

Then redness alone is raised, the quickest way to ruin a model, and guards that see other prompts and the oracle look
after every update: do they stop the run before a tenth of the unseen prompts is lost?

Finished runs are kept in ``--work``. Writes ``rewards`` and ``rewards_alarm``, ``.json`` and ``.md``, into
``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from personalise import RESULTS

from visiontune import config
from visiontune.evaluation.metrics import prompt_accuracy, to_tensor
from visiontune.evaluation.personalise import ordinary_prompts
from visiontune.files import write_json, write_text
from visiontune.models import load
from visiontune.models.base import DiffusionModel
from visiontune.rewards.loading import load as load_reward
from visiontune.sampling.pipeline import images
from visiontune.training.devices import native_bf16
from visiontune.training.loop import Trainer

SEEDS, PILOT = (0, 1, 2), 7
TERMS = ("redness", "pocket-clip")
SECONDS, LOOKS = 120.0, 6
PROMPTS = ordinary_prompts(60)
SAMPLED = {"steps": 10, "cfg_scale": 1.0}
COMMON = [
    "adapter={name: lora, targets: attention, rank: 8}",
    "data=pocket/prompts",
    "reward={name: mix, terms: [redness, pocket-clip]}",
    "objective.steps=10",
    "objective.cfg_scale=1",
    "preview.prompts=[]",
    "train.trackers=[]",
    "train.steps=8000",
]
BLACK_BOX = ["train.batch_size=32", "objective.micro_batch=16"]
# Recipe, options, learning rate.
METHODS: dict[str, tuple[str, list[str], float]] = {
    "AlignProp": ("alignprop", [], 2e-3),
    "DRaFT-1": ("alignprop", ["objective.truncation=fixed", "objective.grad_steps=1"], 2e-3),
    "ReFL": ("refl", [], 2e-3),
    "DDPO": ("ddpo", [*BLACK_BOX, "objective.timestep_fraction=0.5"], 1e-3),
    "PRDP": ("prdp", [*BLACK_BOX, "objective.updates=2"], 1e-3),
    "NFT": ("nft", [*BLACK_BOX, "objective.timesteps=3"], 1e-3),
}
SCORES = ("reward", "redness", "pocket-clip", "oracle")


def look(model: DiffusionModel) -> dict[str, float]:
    """Mean scores on the unseen prompts."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=native_bf16()), torch.no_grad():
        drawn = images(model, PROMPTS, [0] * len(PROMPTS), batch_size=len(PROMPTS), **SAMPLED)
    meta = [{"prompt_id": i} for i in range(len(PROMPTS))]
    found = {name: float(load_reward(name)(to_tensor(drawn), PROMPTS, meta).mean()) for name in TERMS}
    return {"reward": sum(found.values()), **found, "oracle": prompt_accuracy(drawn, PROMPTS)}


class Counted:
    """A reward that counts the pictures it has scored."""

    def __init__(self, reward: Any) -> None:
        self.reward, self.queries = reward, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reward, name)

    def __call__(self, pictures: torch.Tensor, *args: Any) -> torch.Tensor:
        self.queries += len(pictures)
        return self.reward(pictures, *args)


def trainer_of(method: str, seed: int, work: Path, lr: float) -> Trainer:
    recipe, options, _ = METHODS[method]
    precision = "bf16" if native_bf16() else "no"
    own = [f"out={work}", f"name={method}-{seed}-{lr:.3g}", f"seed={seed}", f"train.lr={lr}"]
    run = config.load_run(f"reward_tune/{recipe}", [*COMMON, *options, *own, f"train.precision={precision}"])
    return config.assemble(run)


def curve(method: str, seed: int, work: Path, seconds: float, lr: float | None = None) -> list[dict[str, Any]]:
    """What :func:`look` gives at the start and at ``LOOKS`` equally spaced times of training."""
    lr = METHODS[method][2] if lr is None else lr
    file = work / f"{method}-{seed}-{lr:.3g}-{seconds:g}.json"
    if file.exists():
        return json.loads(file.read_text())
    trainer = trainer_of(method, seed, work, lr)
    assert trainer.online is not None
    updates = trainer.online.objective.updates
    counted = trainer.online.reward = Counted(trainer.online.reward)
    rows, spent, step = [], 0.0, 0
    while True:
        # A rollout serves several steps: it is looked at between rollouts only.
        if spent >= seconds * len(rows) / LOOKS:
            at = {"method": method, "seed": seed, "lr": lr, "seconds": spent, "queries": counted.queries, "steps": step}
            rows.append({**at, **look(trainer.model)})
            print(json.dumps(rows[-1]), flush=True)
        if spent >= seconds:
            break
        for _ in range(updates):
            begun = time.process_time()
            trainer.optimise(step)
            spent, step = spent + time.process_time() - begun, step + 1
    write_json(file, rows)
    return rows


def pilot(method: str, work: Path) -> None:
    """Three learning rates for a third of the time."""
    rate = METHODS[method][2]
    for lr in (rate / 3, rate, rate * 3):
        curve(method, PILOT, work, SECONDS / 3, float(f"{lr:.2g}"))


def alarm(seed: int, work: Path) -> list[dict[str, Any]]:
    """What guards say after every update on redness alone, until a fifth of the unseen prompts is lost."""
    file = work / f"alarm-{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    guards = f"guards={{every: 1, reward: pocket-oracle, holdout: 32, seeds: [0, 1], steps: {SAMPLED['steps']}}}"
    own = [f"out={work}", f"name=alarm-{seed}", f"seed={seed}", "reward=redness", guards, "guards.cfg_scale=1"]
    precision = "bf16" if native_bf16() else "no"
    recipe = config.load_run("reward_tune/alignprop", [*COMMON, *own, f"train.precision={precision}", "train.lr=4e-3"])
    trainer = config.assemble(recipe)
    guard, model, rows = trainer.guard, trainer.model, []
    assert guard is not None
    while not rows or (len(rows) < 40 and rows[-1]["oracle"] > 0.8 * rows[0]["oracle"]):
        if rows:
            trainer.optimise(len(rows) - 1)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=native_bf16()), torch.no_grad():
            pictures = guard.draw(model)
        broken = guard.check(len(rows), guard.measure(pictures, trainer.out, trainer.adapters, model.device))
        if not rows:
            guard.keep(trainer.out, 0, pictures)
        measured = {f"guard/{name}": value for name, value in guard.latest.items()}
        rows.append({"seed": seed, "step": len(rows), "alarms": [b.measure for b in broken], **measured, **look(model)})
        print(json.dumps(rows[-1]), flush=True)
    write_json(file, rows)
    return rows


def alarm_table(runs: list[list[dict[str, Any]]]) -> str:
    """The first alarm of each run, and what was lost by then."""
    lines = ["| seed | first alarm after update | its measure | oracle then, of | redness then, of |", "|---" * 5 + "|"]
    for run in runs:
        first = next((row for row in run if row["alarms"]), None)
        if first is None:
            lines.append(f"| {run[0]['seed']} | none in {len(run) - 1} | | | |")
        else:
            pair = [f"{first[name]:.3f}, {run[0][name]:.3f}" for name in ("oracle", "redness")]
            lines.append(f"| {first['seed']} | {first['step']} | {', '.join(first['alarms'])} | {' | '.join(pair)} |")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Scores at the end, the largest fall of the reward on the way, and what was spent."""
    lines = [
        "| method | runs | queries | updates | " + " | ".join(SCORES) + " | largest fall of the reward |",
        "|---" * (len(SCORES) + 5) + "|",
    ]
    for method in ("base", *METHODS):
        runs = [[r for r in rows if r["method"] == method and r["seed"] == seed] for seed in SEEDS]
        runs = [run for run in runs if run]
        if runs:
            ends = [run[-1] for run in runs]
            cells = [f"{np.mean([e[s] for e in ends]):.3f} ± {np.std([e[s] for e in ends]):.3f}" for s in SCORES]
            spent = [f"{np.mean([e[k] for e in ends]):.0f}" for k in ("queries", "steps")]
            falls = [
                max(max(r["reward"] for r in run[: i + 1]) - run[i]["reward"] for i in range(len(run))) for run in runs
            ]
            lines.append(f"| {method} | {len(runs)} | {' | '.join(spent)} | {' | '.join(cells)} | {max(falls):.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/rewards"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="to share the work")
    parser.add_argument("--pilot", action="store_true", help="three learning rates each, on a seed of their own")
    parser.add_argument("--alarm", action="store_true", help="the guards' part alone")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.pilot:
        for method in args.methods:
            pilot(method, args.work)
        return
    if not args.alarm:
        rows: list[dict[str, Any]] = [
            {"method": "base", "seed": 0, "seconds": 0.0, "queries": 0, "steps": 0, **look(load("pocket/sd"))}
        ]
        for seed in SEEDS:
            for method in args.methods:
                rows += curve(method, seed, args.work, SECONDS)
            if args.methods == list(METHODS):
                write_json(args.out / "rewards.json", rows)
                write_text(args.out / "rewards.md", table(rows))
        print(table(rows))
    if args.methods == list(METHODS):
        runs = [alarm(seed, args.work) for seed in SEEDS]
        write_json(args.out / "rewards_alarm.json", [row for run in runs for row in run])
        write_text(args.out / "rewards_alarm.md", alarm_table(runs))
        print(alarm_table(runs))


if __name__ == "__main__":
    main()
