"""T3-S2S on pocket-sd: two and three objects, each asked for in a region.

    python benchmarks/evidence/t3s2s.py

Writes ``t3s2s.png`` (the first scenes, one a column; one setting a row) and ``t3s2s.json`` into ``samples/guidance``:
how many pictures show just the objects asked for, by shape and colour; how many show each with its middle in its
region, whatever else is there; and the share of the objects that do.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from visiontune.core import Request
from visiontune.files import write_json
from visiontune.guidance import cfg, mixture, t3s2s
from visiontune.guidance._phrases import Phrase
from visiontune.guidance._regions import Region
from visiontune.guidance.base import Term
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load
from visiontune.pocket import oracle
from visiontune.pocket.scenes import article, stream
from visiontune.pocket.world import Thing

OUT = Path(__file__).parents[2] / "samples/guidance"
STEPS, SHOWN = 15, 8
# Left, top, width and height in pixels, of two objects by where the first stands, and of three.
HALVES = {
    "left of": [(0, 0, 32, 64), (32, 0, 32, 64)],
    "right of": [(32, 0, 32, 64), (0, 0, 32, 64)],
    "above": [(0, 0, 64, 32), (0, 32, 64, 32)],
    "below": [(0, 32, 64, 32), (0, 0, 64, 32)],
}
CORNERS = [(0, 0, 32, 32), (32, 0, 32, 32), (16, 32, 32, 32)]
Box = tuple[int, int, int, int]
# A prompt, its objects, and a box of each.
Wish = tuple[str, list[Thing], list[Box]]
OFF = {"balance": "none", "alpha": 1.0, "cross": 0.0, "itself": 0.0}
ROWS: dict[str, dict[str, Any] | None] = {
    "cfg": None,
    "t3s2s": {},
    "balance alone": {**OFF, "balance": "word"},
    "balance alone, phrase": {**OFF, "balance": "phrase"},
    "balance alone, own": {**OFF, "balance": "own"},
    "prominence alone": {**OFF, "alpha": 2.0},
    "prominence alone, select": {**OFF, "alpha": 2.0, "prominence": "select"},
    "dense tuning alone": {**OFF, "cross": 0.1, "itself": 0.1},
    "dense tuning alone, w 1": {**OFF, "cross": 1.0, "itself": 1.0},
    "dense tuning alone, w 1, power 1": {**OFF, "cross": 1.0, "itself": 1.0, "power": 1.0},
    "own, boost": {**OFF, "balance": "own", "alpha": 2.0},
}


def wishes(count: int) -> list[Wish]:
    """Pairs with a relation, and as many scenes of three, whose prompt says nothing of places."""
    found: list[Wish] = []
    for kind in ("two", "three"):
        for scene, _ in itertools.islice(stream(7, kind), count):
            names = [name_of(thing) for thing in scene.things]
            joint = f" {scene.relation} " if scene.relation else " and "
            prompt = joint.join([", ".join(names[:-1]), names[-1]])
            found.append((prompt, [*scene.things], HALVES[scene.relation] if scene.relation else CORNERS))
    return found


def name_of(thing: Thing) -> str:
    return article(f"{thing.color} {thing.shape}")


def terms(wish: Wish, options: dict[str, Any]) -> list[Term]:
    _, things, boxes = wish
    regions = [Phrase(phrase=f"{one.color} {one.shape}", mask=box) for one, box in zip(things, boxes, strict=True)]
    return [t3s2s.Config(regions=regions, **options)]


def mixed(wish: Wish) -> list[Term]:
    """Regions that reach over their boxes by 8 pixels, over a faint background."""
    _, things, boxes = wish
    regions = [Region(box=wider(box), prompt=name_of(one)) for one, box in zip(things, boxes, strict=True)]
    return [mixture.Config(regions=regions, background=0.1, weights="constant")]


def wider(box: Box) -> Box:
    left, top, right, bottom = box[0] - 8, box[1] - 8, box[0] + box[2] + 8, box[1] + box[3] + 8
    left, top = max(left, 0), max(top, 0)
    return left, top, min(right, 64) - left, min(bottom, 64) - top


def drawn(model: Any, wish: Wish, more: list[Term]) -> np.ndarray:
    """uint8 [64, 64, 3]."""
    stack = GuidanceStack([cfg.Config(scale=4.0), *more])
    picture: np.ndarray = model.draw([Request(prompt=wish[0], seed=0)], steps=STEPS, guidance=stack, sampler="ddim")[0]
    return (picture * 255).round().astype(np.uint8)


def scores(pictures: list[np.ndarray], asked: list[Wish]) -> dict[str, float]:
    """Means over the pictures."""
    right, placed, each = [], [], []
    for picture, (_, things, boxes) in zip(pictures, asked, strict=True):
        wanted = tuple(oracle.Wanted(shape=one.shape, color=one.color) for one in things)
        right.append(oracle.matches(picture, oracle.Request(things=wanted)))
        found = [one.thing for one in oracle.read(picture) if one.valid]
        there = [
            any((f.shape, f.color) == (one.shape, one.color) and within(f, box) for f in found)
            for one, box in zip(things, boxes, strict=True)
        ]
        placed.append(all(there))
        each += there
    found_ = {"objects": right, "all placed": placed, "placed": each}
    return {name: round(float(np.mean(values)), 3) for name, values in found_.items()}


def within(thing: Thing, box: Box) -> bool:
    left, top, width, height = box
    return left <= thing.x < left + width and top <= thing.y < top + height


def framed(picture: np.ndarray, boxes: list[Box]) -> np.ndarray:
    """The picture twice as large, with its boxes."""
    shown = Image.fromarray(picture).resize((128, 128), Image.Resampling.NEAREST)
    for left, top, width, height in boxes:
        ImageDraw.Draw(shown).rectangle(
            [2 * v for v in (left, top, left + width, top + height)], outline=(120, 120, 120)
        )
    return np.array(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6, help="scenes of two objects, and as many of three")
    parser.add_argument("--rows", nargs="+", default=[*ROWS, "mixture"], choices=[*ROWS, "mixture"])
    args = parser.parse_args()
    model, asked = load("pocket/sd"), wishes(args.count)
    shown = [*asked[: SHOWN // 2], *asked[args.count : args.count + SHOWN // 2]]
    grid, found = [], {}
    for name in args.rows:
        options = ROWS.get(name)
        pictures = [
            drawn(model, one, mixed(one) if name == "mixture" else [] if options is None else terms(one, options))
            for one in asked
        ]
        by = [np.array([framed(p, w[2])]) for p, w in zip(pictures, asked, strict=True) if any(w is s for s in shown)]
        grid.append(np.concatenate(np.concatenate(by), axis=1))
        half = args.count
        found[name] = {
            "two": scores(pictures[:half], asked[:half]),
            "three": scores(pictures[half:], asked[half:]),
        }
        print(name, found[name], flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(grid)).save(OUT / "t3s2s.png")
    write_json(
        OUT / "t3s2s.json",
        {
            "command": shlex.join(["python", "benchmarks/evidence/t3s2s.py", *sys.argv[1:]]),
            "steps": STEPS,
            "rows": found,
        },
    )


if __name__ == "__main__":
    main()
