"""A grid of stacks of guidance on pocket-sd: one stack a row, one prompt a column.

    python benchmarks/evidence/stacks.py

Writes ``stacks.png`` and ``stacks.json`` into ``samples/guidance``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from visiontune.files import write_json
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load
from visiontune.sampling.grid import grid
from visiontune.sampling.pipeline import images

OUT = Path(__file__).parents[2] / "samples/guidance"
STEPS, SEED = 20, 1
PROMPTS = [
    "a blue star",
    "a red circle left of a blue square",
    "a green triangle above a yellow star",
    "a purple heart on a dark checked background",
    "three cyan squares",
]
LAYOUT: dict[str, Any] = {"picture": "pocket/mallow/1", "scale": 0.5}
STACKS: dict[str, list[Any]] = {
    "cfg 4": [{"cfg": 4}],
    "cfg 4, inherit 2": [{"cfg": 4}, {"inherit": 2}],
    "apg 4, pag 0.5": [{"apg": 4}, {"pag": 0.5}],
    "cfg 4, slg and seg while noisy": [
        {"cfg": 4},
        {"slg": {"scale": 1, "window": [0.5, 1]}},
        {"seg": {"scale": 1, "window": [0.5, 1]}},
    ],
    "cfg 6, pag 1, in the layout of a picture": [{"cfg": 6}, {"pag": 1}, {"magicmix": LAYOUT}],
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model, drawn, rows = load("pocket/sd"), [], {}
    for name, specs in STACKS.items():
        stack = GuidanceStack.of(specs)
        rows[name] = {"guidance": specs, "network sees each picture": sum(stack.plan(model, STEPS).rows)}
        drawn += list(images(model, PROMPTS, SEED, steps=STEPS, guidance=stack))
    grid(drawn, len(PROMPTS), row_captions=[*STACKS], column_captions=PROMPTS).save(OUT / "stacks.png")
    said = {"command": "python benchmarks/evidence/stacks.py", "model": "pocket/sd", "steps": STEPS, "seed": SEED}
    write_json(OUT / "stacks.json", {**said, "prompts": PROMPTS, "rows": rows})


if __name__ == "__main__":
    main()
