"""Controls on pocket-sd, alone and together: outlines and colours of one scene, of two, and of two objects of one.

    python benchmarks/evidence/controls.py

Writes ``control.png`` and ``maxfusion.png`` (a scene a column, a setting a row) and a JSON beside each into
``samples/guidance``: of the objects that a map shows, the share that is drawn in its place, with its shape for outlines
and with its colour for colours. Nothing is said in words, so what is not controlled is drawn at random.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visiontune.core import Request
from visiontune.files import write_json
from visiontune.guidance import control, maxfusion
from visiontune.guidance.base import Term
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load
from visiontune.pocket.controls import MAPS, followed
from visiontune.pocket.scenes import stream
from visiontune.pocket.world import Scene, render

OUT = Path(__file__).parents[2] / "samples/guidance"
STEPS, SHOWN = 10, 8
# Chosen on six other scenes.
SCALES = {"sketch": 1.0, "colors": 2.0}
# What the outlines are of, and what the colours are of.
Pair = tuple[Scene, Scene]
Terms = Callable[[control.Config, control.Config], Sequence[Term]]
ALONE: dict[str, Terms] = {
    "nothing": lambda sketch, colors: [],
    "sketch": lambda sketch, colors: [sketch],
    "colors": lambda sketch, colors: [colors],
}
TOGETHER: dict[str, Terms] = {
    "summed": lambda sketch, colors: [sketch, colors],
    "summed, half of each": lambda sketch, colors: [halved(sketch), halved(colors)],
    "maxfusion": lambda sketch, colors: [maxfusion.Config(controls=[sketch, colors])],
    "maxfusion, tau 1": lambda sketch, colors: [maxfusion.Config(controls=[sketch, colors], tau=1.0)],
}


def pairs(count: int) -> dict[str, list[Pair]]:
    """Of held-out scenes: the same for both maps; others; and of scenes of two objects one for each map."""
    scenes, others, twos = (
        [scene for scene, _ in itertools.islice(stream(seed, kind, holdout=True), count)]
        for seed, kind in ((81, None), (82, None), (83, "two"))
    )
    apart = [tuple(replace(scene, things=(thing,)) for thing in scene.things) for scene in twos]
    return {
        "one scene": [(scene, scene) for scene in scenes],
        "two objects": [(first, second) for first, second in apart],
        "two scenes": list(zip(scenes, others, strict=True)),
    }


def shown(pair: Pair) -> tuple[control.Config, control.Config]:
    """A control by outlines and one by colours."""
    sketch, colors = (
        control.Config(net=f"pocket/{name}", picture=Image.fromarray(of_picture(render(scene))), scale=SCALES[name])
        for (name, of_picture), scene in zip(MAPS.items(), pair, strict=True)
    )
    return sketch, colors


def halved(one: control.Config) -> control.Config:
    """Half as strong: added up, two of them are as strong as their mean, which is what is merged."""
    return replace(one, scale=one.scale / 2)


def drawn(model: Any, pair: Pair, terms: Terms, seed: int) -> np.ndarray:
    """A picture, uint8 [64, 64, 3]."""
    stack = GuidanceStack(terms(*shown(pair)))
    picture: np.ndarray = model.draw([Request(prompt="", seed=seed)], steps=STEPS, guidance=stack, sampler="ddim")[0]
    return (picture * 255).round().astype(np.uint8)


def scores(pictures: Sequence[np.ndarray], given: Sequence[Pair]) -> dict[str, float]:
    """Means over the pictures."""
    outlines, paints = zip(*given, strict=True)
    shape = [followed(one, scene)["shape"] for one, scene in zip(pictures, outlines, strict=True)]
    color = [followed(one, scene)["color"] for one, scene in zip(pictures, paints, strict=True)]
    return {"sketch": float(np.mean(shape)), "colors": float(np.mean(color))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    args = parser.parse_args()
    model, grids = load("pocket/sd"), {"control": [], "maxfusion": []}
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {"control": {}, "maxfusion": {}}
    for kind, given in pairs(args.count).items():
        maps = [[np.array(one.picture) for one in shown(pair)] for pair in given]
        for file, settings in (("control", ALONE), ("maxfusion", TOGETHER)):
            if file == "control" and kind != "one scene":
                continue
            grids[file] += [row(maps, 0), row(maps, 1)]
            for name, terms in settings.items():
                pictures = [drawn(model, pair, terms, seed) for seed, pair in enumerate(given)]
                grids[file].append(np.concatenate(pictures[:SHOWN], axis=1))
                rounded = {key: round(value, 3) for key, value in scores(pictures, given).items()}
                found[file].setdefault(kind, {})[name] = rounded
                print(kind, name, rounded, flush=True)
    for file, grid in grids.items():
        whole = Image.fromarray(np.concatenate(grid))
        whole.save(OUT / f"{file}.png")
        command = "python benchmarks/evidence/controls.py"
        write_json(
            OUT / f"{file}.json", {"command": command, "steps": STEPS, "scenes": args.count, "rows": found[file]}
        )


def row(maps: Sequence[Sequence[np.ndarray]], which: int) -> np.ndarray:
    """The maps of one kind, side by side."""
    return np.concatenate([pair[which] for pair in maps[:SHOWN]], axis=1)


if __name__ == "__main__":
    main()
