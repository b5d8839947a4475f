"""OneActor on pocket-sd: the object of one picture in eight others, whose prompt says nothing of its colour.

    python benchmarks/evidence/oneactor.py

Fits a character to the picture of each seed, writes that of the first as ``oneactor.safetensors``, ``oneactor.png``
(the fitted picture, then eight of other seeds; one setting a row) and ``oneactor.json`` into ``samples/guidance``: how
many pictures show one clean object of the shape; of how many it has the colour of the fitted picture; how many have
the colour that most of the eight have; and the deviation of the radius, in pixels.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visiontune.core import Request
from visiontune.files import write_json
from visiontune.guidance import cfg, oneactor
from visiontune.guidance.actor import Actor, Fitting, fit
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load
from visiontune.pocket import oracle

OUT = Path(__file__).parents[2] / "samples/guidance"
PROMPT, WORD, SHAPE = "a circle", "circle", "circle"
STEPS, COUNT, SCALE = 15, 8, 4.0
FITTING = Fitting(siblings=6, steps=100, lr=5e-4, drawing=10, cfg_scale=SCALE)
ROWS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "v 0.8": {},
    "v 0.8, all levels": {"window": (0.0, 1.0)},
}


def drawn(model: Any, seeds: list[int], actor: Actor, options: dict[str, Any] | None) -> np.ndarray:
    """uint8 [n, 64, 64, 3]."""
    more = [] if options is None else [oneactor.Config(file=actor, **options)]
    requests = [Request(prompt=PROMPT, seed=seed) for seed in seeds]
    stack = GuidanceStack([cfg.Config(scale=SCALE), *more])
    pictures: np.ndarray = model.draw(requests, steps=STEPS, guidance=stack, sampler="ddim")
    return (pictures * 255).round().astype(np.uint8)


def scores(pictures: np.ndarray, color: str) -> dict[str, float]:
    things = [found[0].thing for one in pictures if len(found := oracle.read(one)) == 1 and found[0].valid]
    things = [thing for thing in things if thing.shape == SHAPE]
    colors = Counter(thing.color for thing in things)
    return {
        "objects": len(things) / len(pictures),
        "colour of the picture": colors[color] / len(pictures),
        "commonest colour": max(colors.values(), default=0) / len(pictures),
        "deviation of radius": round(float(np.std([thing.radius for thing in things])), 2) if things else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[4], help="of the pictures that are fitted")
    args = parser.parse_args()
    model, grid, found = load("pocket/sd"), [], {}
    OUT.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        actor = fit(model, PROMPT, WORD, seed, FITTING)
        picture = drawn(model, [seed], actor, None)
        color = oracle.read(picture[0])[0].thing.color
        if seed == args.seeds[0]:
            actor.save(OUT / "oneactor.safetensors")
        for name, options in ROWS.items():
            pictures = drawn(model, [*range(100, 100 + COUNT)], actor, options)
            grid.append(np.concatenate([*picture, *pictures], axis=1))
            found.setdefault(f"seed {seed}, {color}", {})[name] = scores(pictures, color)
            print(seed, name, scores(pictures, color), flush=True)
    whole = Image.fromarray(np.concatenate(grid))
    whole.resize((2 * whole.width, 2 * whole.height), Image.Resampling.NEAREST).save(OUT / "oneactor.png")
    write_json(
        OUT / "oneactor.json",
        {"command": "python benchmarks/evidence/oneactor.py", "prompt": PROMPT, "steps": STEPS, "rows": found},
    )


if __name__ == "__main__":
    main()
