"""Do a reward's gradient, and searches by it, raise more than the reward? On pocket-sd, by pocket-clip.

    python benchmarks/evidence/steering.py

Held-out prompts of two and of three objects, three sets of seeds, 10 DDIM steps with CFG 4. The reward that guides or
chooses is pocket-clip; the oracle, which it never sees, says whether a picture shows what was asked. Of the same
candidates that `best_of` draws: what a choice by chance gives (the first), what the reward chooses, and what the oracle
itself would choose, which bounds every choice. Finished rows are kept beside the table, so the command goes on where
it stopped. Writes ``steering.json`` and ``steering.md`` into ``benchmarks/results/``.
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

from visiontune.core import Request
from visiontune.evaluation.metrics import prompt_accuracy
from visiontune.files import write_json, write_text
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load
from visiontune.pocket.scenes import stream
from visiontune.sampling.pipeline import images
from visiontune.sampling.searched import Searcher
from visiontune.search.asked import Asked
from visiontune.search.base import nth

STEPS, CANDIDATES, SETS, PROMPTS = 10, 8, 3, 40
REWARD = "pocket-clip"
GUIDED: dict[str, dict[str, Any]] = {
    "gradient, s 1000, clip 0.25": {"scale": 1000, "clip": 0.25},
    "gradient, s 1000, clip 0.25, noisy half": {"scale": 1000, "clip": 0.25, "window": [0.5, 1]},
    "gradient, s 1000, clip 0.1": {"scale": 1000, "clip": 0.1},
    "gradient through the network, s 1000, clip 0.1": {"scale": 1000, "clip": 0.1, "through": "network"},
}
SEARCHED: dict[str, dict[str, Any]] = {
    "zero_order 1 + 4": {"zero_order": {"n": 4, "iterations": 1, "radius": 0.4}},
    "fk 4": {"fk": {"n": 4, "scale": 20, "every": 2}},
}
KINDS = ("two", "three")


def prompts_of(kind: str) -> list[str]:
    """Held-out prompts."""
    return [text for _, text in itertools.islice(stream(78, kind, holdout=True), PROMPTS)]


def requests_of(kind: str, seeds: int) -> list[Request]:
    """The prompts, each with a seed of its own."""
    return [Request(prompt=text, seed=1000 * seeds + i) for i, text in enumerate(prompts_of(kind))]


def draw(model: Any, requests: Sequence[Request], **options: Any) -> np.ndarray:
    """Pictures of requests."""
    prompts, seeds = [one.prompt for one in requests], [one.seed for one in requests]
    return images(model, prompts, seeds, steps=STEPS, batch_size=PROMPTS, **options)


def row(pictures: np.ndarray, rewards: Sequence[float], prompts: Sequence[str], pictures_drawn: float) -> dict:
    """Of pictures that were kept."""
    return {
        "drawn": pictures_drawn,
        "reward": float(np.mean(rewards)),
        "oracle": prompt_accuracy(pictures, prompts),
    }


def candidates(model: Any, kind: str, seeds: int, searcher: Searcher) -> dict[str, dict]:
    """The same candidates, chosen by the reward and by the oracle, for every number of them."""
    own = requests_of(kind, seeds)
    prompts = [one.prompt for one in own]
    drawn = [draw(model, [nth(one, k) for one in own]) for k in range(CANDIDATES)]
    rewards = np.array([searcher.at.score(pictures, own) for pictures in drawn])
    right = np.array([[prompt_accuracy(p[None], [t]) for p, t in zip(some, prompts, strict=True)] for some in drawn])
    found = {"no search": row(drawn[0], list(rewards[0]), prompts, 1)}
    for n in (2, 4, 8):
        best = rewards[:n].argmax(0)
        kept = np.stack([drawn[k][i] for i, k in enumerate(best)])
        found[f"best_of {n}"] = row(kept, list(rewards[:n].max(0)), prompts, n)
        found[f"best_of {n}"]["bound"] = float(right[:n].max(0).mean())
    return found


def measure(model: Any, kind: str, seeds: int, name: str) -> dict[str, dict]:
    """Rows of a set of seeds."""
    own = requests_of(kind, seeds)
    prompts = [one.prompt for one in own]
    asked = Asked.of({**SEARCHED.get(name, {"best_of": 2}), "reward": REWARD})
    searcher = Searcher.of(asked, model, steps=STEPS, batch_size=PROMPTS)
    if name == "candidates":
        return candidates(model, kind, seeds, searcher)
    if name in GUIDED:
        stack = GuidanceStack.of([{"cfg": 4}, {"reward": {"reward": REWARD, **GUIDED[name]}}])
        pictures = draw(model, own, guidance=stack)
        return {name: row(pictures, searcher.at.score(pictures, own), prompts, 1)}
    found = [one for one, _ in searcher(own)]
    drawn = searcher.method.cost(searcher.at).pictures
    return {name: row(np.stack([one.picture for one in found]), [one.reward for one in found], prompts, drawn)}


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One way a line, two objects before three."""
    head = ["objects", "way", "pictures drawn", "reward", "oracle", "the oracle's own choice"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, rows in found.items():
        kind, _, way = name.partition(": ")
        bound = spread([r["bound"] for r in rows]) if "bound" in rows[0] else ""
        cells = [kind, way, f"{rows[0]['drawn']:.0f}", spread([r["reward"] for r in rows])]
        lines.append("| " + " | ".join([*cells, spread([r["oracle"] for r in rows]), bound]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    model, kept = load("pocket/sd"), Kept("steering")
    found: dict[str, list[dict[str, float]]] = {}
    for seeds, kind, name in itertools.product(range(SETS), KINDS, ("candidates", *GUIDED, *SEARCHED)):
        of = {"way": GUIDED.get(name, SEARCHED.get(name)), "sizes": [STEPS, CANDIDATES, PROMPTS], "by": REWARD}
        rows = kept.row(f"{kind}: {name}, {seeds}", of, functools.partial(measure, model, kind, seeds, name))
        for way, one in rows.items():
            found.setdefault(f"{kind}: {way}", []).append(one)
        ordered = {name: found[name] for name in sorted(found, key=lambda name: KINDS.index(name.partition(":")[0]))}
        write_json(args.out / "steering.json", ordered)
        write_text(args.out / "steering.md", table(ordered))


if __name__ == "__main__":
    main()
