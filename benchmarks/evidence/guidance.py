"""What each term of guidance, and stacks of them, do to the pictures of pocket-sd, at equal numbers of network calls.

    python benchmarks/evidence/guidance.py

Every stack has as many steps as its calls leave room for: rows that the network sees for one picture, those of 25
steps of CFG, and for some of them twice as many. Held-out prompts of one, two and three objects, three sets of seeds;
the oracle says how many come right. Beside it: how colourful the pictures are, and how far from the rendered world in
mean and deviation of each colour; how different the pictures of one prompt are. The rows without guidance, and of CFG
with all its calls put into steps, are what a term has to beat. Finished rows are kept beside the table, so the command
goes on where it stopped. Writes ``guidance.json`` and ``guidance.md`` into ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kept import RESULTS, Kept
from personalise import spread

from visiontune.evaluation.metrics import prompt_accuracy
from visiontune.files import write_json, write_text
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load
from visiontune.pocket.scenes import stream
from visiontune.pocket.world import Scene, render
from visiontune.sampling.pipeline import images
from visiontune.training.measures import diversity

Specs = Sequence[Mapping[str, Any] | str]
BUDGET, SETS = 50, 3
PROMPTS = {"one": 20, "two": 40, "three": 60}
EARLY, MIDDLE = [0.5, 1.0], [0.2, 0.8]
STACKS: dict[str, Specs] = {
    "no guidance": [{"cfg": 1}],
    "cfg 2.5": [{"cfg": 2.5}],
    "cfg 4": [{"cfg": 4}],
    "cfg 7": [{"cfg": 7}],
    "cfg 4, noisy half": [{"cfg": {"scale": 4, "window": EARLY}}],
    "cfg 4, interval": [{"cfg": {"scale": 4, "window": MIDDLE}}],
    "cfg 4, linear": [{"cfg": {"scale": 4, "schedule": "linear"}}],
    "cfg 7, rescale": [{"cfg": 7}, "rescale"],
    "apg 7": [{"apg": 7}],
    "apg 7, no momentum": [{"apg": {"scale": 7, "momentum": 0.0}}],
    "cfg_zero 4": [{"cfg_zero": {"scale": 4, "zero": None}}],
    "pag 2": [{"cfg": 1}, {"pag": 2}],
    "cfg 4, pag 1": [{"cfg": 4}, {"pag": 1}],
    "cfg 4, pag 3": [{"cfg": 4}, {"pag": 3}],
    "cfg 4, pag 1 of all": [{"cfg": 4}, {"pag": {"scale": 1, "layers": "all"}}],
    "cfg 4, pag 2, noisy half": [{"cfg": 4}, {"pag": {"scale": 2, "window": EARLY}}],
    "cfg 4, seg 1": [{"cfg": 4}, {"seg": 1}],
    "cfg 4, seg 3": [{"cfg": 4}, {"seg": 3}],
    "cfg 4, slg 1": [{"cfg": 4}, {"slg": 1}],
    "cfg 4, slg 1, noisy half": [{"cfg": 4}, {"slg": {"scale": 1, "window": EARLY}}],
    "apg 7, pag 1": [{"apg": 7}, {"pag": 1}],
    "apg 7, seg 1, rescale": [{"apg": 7}, {"seg": 1}, "rescale"],
    "cfg 4, pag 1, slg 1": [{"cfg": 4}, {"pag": 1}, {"slg": 1}],
}
# Those that are given twice the calls, too.
TWICE = ("cfg 4", "cfg 7", "cfg 4, linear", "cfg 4, pag 1", "cfg 4, pag 3", "cfg 4, seg 1", "apg 7, pag 1")
SCORES = (*PROMPTS, "colourful", "off", "diverse")


def steps_for(model: Any, stack: GuidanceStack, budget: int) -> int:
    """The most steps with which the network sees a picture at most `budget` times."""
    return max(steps for steps in range(2, budget + 1) if sum(stack.plan(model, steps).rows) <= budget)


def drawn_from(kind: str) -> list[tuple[Scene, str]]:
    """Held-out scenes and their prompts."""
    return list(itertools.islice(stream(77, kind, holdout=True), PROMPTS[kind]))


def measure(model: Any, specs: Specs, budget: int, seeds: int) -> dict[str, float]:
    """Scores of a stack for one set of seeds."""
    stack = GuidanceStack.of(specs)
    steps = steps_for(model, stack, budget)
    row: dict[str, float] = {"steps": steps, "rows": sum(stack.plan(model, steps).rows)}
    seen, true, again = [], [], []
    for kind in PROMPTS:
        scenes = drawn_from(kind)
        prompts = [prompt for _, prompt in scenes]
        own = [1000 * seeds + i for i in range(len(prompts))]
        pictures = images(model, prompts, own, steps=steps, guidance=stack, batch_size=len(prompts))
        row[kind] = prompt_accuracy(pictures, prompts)
        seen.append(pictures)
        true.append(np.stack([render(scene) for scene, _ in scenes]))
        again.append([(prompts[0], seed) for seed in own[:4]])
    few = [pair for pairs in again for pair in pairs]
    other = images(model, *map(list, zip(*few, strict=True)), steps=steps, guidance=stack, batch_size=len(few))
    row["diverse"] = diversity(other.reshape(len(PROMPTS), -1, *other.shape[1:]))
    pictures, world = np.concatenate(seen), np.concatenate(true)
    row["colourful"] = float((np.ptp(pictures.astype(float), axis=-1) / 255).mean())
    row["off"] = float(np.abs(_statistics(pictures) - _statistics(world)).mean())
    return row


def _statistics(pictures: np.ndarray) -> np.ndarray:
    """Mean and deviation of each colour, in [0, 1]."""
    values = pictures.reshape(-1, 3) / 255
    return np.stack([values.mean(0), values.std(0)])


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One stack a line, in each budget those with the most triples first."""
    head = ["stack", "calls", "steps", *(f"{kind} right" for kind in PROMPTS), "colourful", "off the world", "diverse"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    order = sorted(found, key=lambda name: (found[name][0]["rows"] > BUDGET, -_mean(found[name], "three")))
    for name in order:
        rows = found[name]
        cells = [name.rpartition(" @ ")[0], f"{rows[0]['rows']:.0f}", f"{rows[0]['steps']:.0f}"]
        lines.append("| " + " | ".join(cells + [spread([row[s] for row in rows]) for s in SCORES]) + " |")
    return "\n".join(lines) + "\n"


def _mean(rows: Sequence[Mapping[str, float]], score: str) -> float:
    return float(np.mean([row[score] for row in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", choices=list(STACKS), default=list(STACKS))
    args = parser.parse_args()
    model, found, kept = load("pocket/sd"), dict[str, list[dict[str, float]]](), Kept("guidance")
    wanted = [(BUDGET, name) for name in args.only] + [(2 * BUDGET, name) for name in args.only if name in TWICE]
    for seeds, (budget, name) in itertools.product(range(SETS), wanted):
        of = {"stack": STACKS[name], "prompts": PROMPTS}
        row = kept.row(
            f"{name} @ {budget}, {seeds}", of, functools.partial(measure, model, STACKS[name], budget, seeds)
        )
        found.setdefault(f"{name} @ {budget}", []).append(row)
        write_json(args.out / "guidance.json", found)
        write_text(args.out / "guidance.md", table(found))


if __name__ == "__main__":
    main()
