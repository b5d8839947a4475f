"""Content of one set and the look of another in one adapter: sets split by noise, mixed, and split the other way.

    python benchmarks/evidence/tailoring.py RUN...       # folders of finished runs of compose/style_tailoring

One set has three objects, which pocket/sd mostly gets wrong, in its own flat look; the other one object, shaded. Two
shares of pictures, of prompts that no training set has, by the oracle: `right`, three objects as they are asked for;
`shaded`, a picture whose objects are all brighter above than below. Rows beside those of the runs: the base, and true
pictures of both looks, which say what the judges are worth. Writes ``tailoring.json`` and ``tailoring.md`` into
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from kept import RESULTS

from visiontune import adapters
from visiontune.files import write_json, write_text
from visiontune.models import load
from visiontune.pocket import oracle
from visiontune.pocket.scenes import stream
from visiontune.pocket.world import render
from visiontune.sampling.pipeline import images

SEED, COUNT, STEPS, SCALE = 75, 60, 25, 4.0
# Brightness of an object's upper third over that of its lower one: 1 of a flat object, 1.9 of a shaded one.
BRIGHTER = 1.3


def shaded(picture: np.ndarray) -> bool:
    """Whether there are objects, and all are brighter above than below."""
    found = oracle.read(picture)
    return bool(found) and all(ratio(picture, one.mask) > BRIGHTER for one in found)


def ratio(picture: np.ndarray, mask: np.ndarray) -> float:
    """Mean brightness of the upper third of what a mask covers over that of the lower one."""
    rows, _ = np.nonzero(mask)
    light = picture[mask].astype(float).mean(-1)
    high, low = np.quantile(rows, [1 / 3, 2 / 3])
    return float(light[rows <= high].mean() / light[rows >= low].mean())


def scores(pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, float]:
    right = [oracle.matches(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    looks = [shaded(picture) for picture in pictures]
    both = [a and b for a, b in zip(right, looks, strict=True)]
    return {
        name: round(float(np.mean(own)), 3) for name, own in {"right": right, "shaded": looks, "both": both}.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=COUNT, help="pictures of each row")
    parser.add_argument("--note", default="", help="how the runs were trained")
    args = parser.parse_args()
    given = list(islice(stream(SEED, "three", holdout=True), args.count))
    prompts = [words for _, words in given]
    rows = {
        f"true pictures, {style}": scores([render(replace(scene, style=style)) for scene, _ in given], prompts)
        for style in ("flat", "shaded")
    }
    model: Any = load("pocket/sd")
    for run in [None, *args.runs]:
        attached = None if run is None else adapters.load(model.networks(), run / "adapter.safetensors").eval()
        drawn = images(model, prompts, list(range(args.count)), steps=STEPS, cfg_scale=SCALE)
        if attached is not None:
            attached.detach()
        rows["the base" if run is None else run.name] = scores(list(drawn), prompts)
        print(run, rows["the base" if run is None else run.name], flush=True)
    lines = ["| | right | shaded | both |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(f'{value:.2f}' for value in own.values())} |" for name, own in rows.items()]
    how = f"{args.count} held-out prompts for three objects, {STEPS} steps, cfg_scale {SCALE:g}. {args.note}".rstrip()
    text = f"# Style Tailoring\n\n{how}"
    write_json(RESULTS / "tailoring.json", {"count": args.count, "rows": rows})
    write_text(RESULTS / "tailoring.md", text + "\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
