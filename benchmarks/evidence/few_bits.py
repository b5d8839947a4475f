"""pocket-sd in few bits, as it is rounded and after QuEST has tuned a part of it, judged by the oracle.

    python benchmarks/evidence/few_bits.py

Two seeds, of the states that are tuned on. `right`: the oracle finds just what a held-out prompt asks, with what it
finds in the picture of another prompt as chance. `gap`: mean squared difference from the prediction in full precision,
on the way of held-out prompts. In the place of QuEST's layers others of about as many weights are tuned, too, which are
drawn by lot for each seed.

Finished rows are kept. Writes ``few_bits.json`` and ``few_bits.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from kept import RESULTS, Kept
from ratings import prompts

from visiontune.data.base import Config
from visiontune.data.readers import read
from visiontune.evaluation.metrics import prompt_accuracy
from visiontune.files import write_json, write_text
from visiontune.models import load
from visiontune.models.low_bits import Bits, LowBits
from visiontune.sampling.pipeline import images
from visiontune.training.quest import TIME, Tuning, gap, quantised, trajectories, tune

SEEDS, STEPS, CFG_SCALE = (0, 1), 12, 4.0
BITS = {"w4a8": Bits(weights=4, inputs=8), "w4a4": Bits(weights=4, inputs=4)}
WAYS = ["rounded", "QuEST", "other layers"]
FULL = "full precision"

Scores = dict[str, float]


def lot(low: LowBits, tuning: Tuning, seed: int) -> list[str]:
    """Layers of about as many weights as QuEST tunes, none of which are its own."""
    own = [n for n in low.layers if re.fullmatch(TIME, n) or re.fullmatch(tuning.sensitive, n)]
    wanted = sum(low.weight(name).numel() for name in own)
    others = [name for name in low.layers if name not in own]
    chosen = []
    for i in torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist():
        if wanted > 0:
            chosen.append(others[i])
            wanted -= low.weight(others[i]).numel()
    return chosen


def row(bits: Bits | None, way: str, seed: int, args: argparse.Namespace) -> Scores:
    """Scores of one way."""
    model, teacher = (load("pocket/sd") for _ in range(2))
    words, share = prompts(args.prompts), 0.0
    if bits is not None:
        captions = [sample.caption for sample in read(Config(root="pocket/scenes"))]
        own = captions[args.count * seed : args.count * (seed + 1)]
        low = quantised(model, bits, seen := trajectories(teacher, own, STEPS, CFG_SCALE, seed))
        tuning = Tuning(lr=args.lr, step_lr=args.step_lr)
        if way != "rounded":
            if way == "other layers":
                names = lot(low, tuning, seed)
                tuning = replace(tuning, sensitive="|".join(map(re.escape, names)), time_steps=0)
                tuning = replace(tuning, steps=tuning.steps + Tuning.time_steps * STEPS)
            tuned = tune(low, teacher, seen, tuning, seed)
            whole = sum(low.weight(name).numel() for name in low.layers)
            share = sum(low.weight(name).numel() for name in tuned) / whole
    held = trajectories(teacher, words[:8], STEPS, CFG_SCALE, 1000)
    drawn = images(model, words, [1000 * seed + i for i in range(len(words))], steps=STEPS, cfg_scale=CFG_SCALE)
    right, chance = prompt_accuracy(drawn, words), prompt_accuracy(np.roll(drawn, 1, 0), words)
    apart = float(f"{gap(model, teacher, held):.3g}")
    return {"right": round(right, 3), "chance": round(chance, 3), "gap": apart, "tuned": round(share, 3)}


def table(rows: dict[str, list[Scores]]) -> str:
    """Each seed and the means."""
    lines = ["| | right (each seed) | chance | gap | weights that are tuned |", "|---|---|---|---|---|"]
    for name, found in rows.items():
        mean: Any = {key: np.mean([one[key] for one in found]) for key in found[0]}
        each = ", ".join(f"{one['right']:.2f}" for one in found)
        numbers = f"{mean['chance']:.2f} | {mean['gap']:.2e} | {mean['tuned']:.0%}"
        lines.append(f"| {name} | {mean['right']:.2f} ({each}) | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--count", type=int, default=24, help="prompts whose states are tuned on")
    parser.add_argument("--lr", type=float, default=Tuning.lr)
    parser.add_argument("--step-lr", type=float, default=Tuning.step_lr)
    parser.add_argument("--bits", nargs="+", choices=BITS, default=list(BITS), help="only run these")
    parser.add_argument("--ways", nargs="+", choices=[FULL, *WAYS], default=[FULL, *WAYS], help="only run these")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="only these")
    args = parser.parse_args()
    kept, rows = Kept("few_bits"), dict[str, list[Scores]]()
    cases = [(FULL, FULL, None), *((f"{name}, {way}", way, bits) for name, bits in BITS.items() for way in WAYS)]
    for seed in SEEDS:
        for name, way, bits in cases:
            of = [
                name,
                args.prompts,
                args.count,
                STEPS,
                CFG_SCALE,
                args.lr,
                args.step_lr,
                Tuning.steps,
                Tuning.time_steps,
            ]
            wanted = way in args.ways and seed in args.seeds and (bits is None or name.partition(",")[0] in args.bits)
            make = partial(row, bits, way, seed, args)
            found = kept.row(f"{name}-{seed}", of, make) if wanted else kept.find(f"{name}-{seed}", of)
            rows[name] = [*rows.get(name, []), *([found] if found else [])]
    rows = {name: found for name, found in rows.items() if found}
    how = {"prompts": args.prompts, "steps": STEPS, "cfg_scale": CFG_SCALE, "lr": args.lr, "step_lr": args.step_lr}
    write_json(RESULTS / "few_bits.json", {**how, "rows": rows})
    write_text(
        RESULTS / "few_bits.md",
        f"# Few bits\n\n{args.prompts} held-out prompts, {STEPS} steps, cfg_scale {CFG_SCALE:g}; see "
        f"`benchmarks/evidence/few_bits.py`.\n\n{table(rows)}\n",
    )
    print(table(rows))


if __name__ == "__main__":
    main()
