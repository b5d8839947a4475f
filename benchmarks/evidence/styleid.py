"""StyleID on pocket-sd: scenes on a light ground in the style of one on a dark one.

    python benchmarks/evidence/styleid.py

Writes ``styleid.png`` (the style, then the first scenes, one a column; one setting a row) and ``styleid.json`` into
``samples/guidance``: how many pictures show the scene's objects, by shape and by shape and colour, how many stand on
the style's tone and texture, and how far latents are from the style's in mean and deviation of a channel.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from visiontune.core import Request
from visiontune.files import write_json
from visiontune.guidance import cfg, styleid
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load
from visiontune.ops.pixels import to_tensor
from visiontune.pocket import oracle
from visiontune.pocket.scenes import caption, stream
from visiontune.pocket.world import Scene, render

OUT = Path(__file__).parents[2] / "samples/guidance"
STEPS, SHOWN = 15, 7
# Of each row the scale of CFG, and the options of the term. Prompts name the objects and no ground.
ROWS: dict[str, tuple[float, dict[str, float]] | None] = {
    "the scenes": None,
    "prompts, next to no style": (4.0, {"scale": 1e-6, "adain": 0.0}),
    "prompts, scale 0.25": (4.0, {"scale": 0.25}),
    "prompts, scale 0.5": (4.0, {"scale": 0.5}),
    "prompts, scale 1": (4.0, {}),
    "no prompts, scale 1": (1.0, {}),
}


def contents(count: int) -> list[Scene]:
    """Scenes of one to three objects on a plain light ground."""
    return [replace(scene, tone="light", texture="plain") for scene, _ in itertools.islice(stream(7), count)]


def named(scene: Scene) -> str:
    """The scene's caption without its ground."""
    return caption(scene, np.random.default_rng(0), detail=1).partition(" on a ")[0]


def drawn(model: Any, scene: Scene, style: np.ndarray, scale: float, options: dict[str, float]) -> np.ndarray:
    """The scene in the style, uint8 [64, 64, 3]."""
    term = styleid.Config(content=Image.fromarray(render(scene)), style=Image.fromarray(style), **options)
    request = Request(prompt=named(scene) if scale != 1 else "", seed=0)
    stack = GuidanceStack([cfg.Config(scale=scale), term])
    picture: np.ndarray = model.draw([request], steps=STEPS, guidance=stack, sampler="ddim")[0]
    return (picture * 255).round().astype(np.uint8)


def scores(model: Any, pictures: list[np.ndarray], scenes: list[Scene], style: Scene) -> dict[str, float]:
    """Means over the pictures."""
    colours = [[oracle.Wanted(shape=one.shape, color=one.color) for one in scene.things] for scene in scenes]
    shapes = [[oracle.Wanted(shape=one.shape) for one in scene.things] for scene in scenes]

    def right(wanted: list[list[oracle.Wanted]]) -> float:
        pairs = zip(pictures, wanted, strict=True)
        return float(np.mean([oracle.matches(one, oracle.Request(things=tuple(asked))) for one, asked in pairs]))

    latents = model.encode(2 * to_tensor(np.stack([render(style), *pictures])) - 1, sample=False)
    deviation, mean = torch.std_mean(latents, (2, 3))
    grounds = [oracle.ground_of(one) for one in pictures]
    return {
        "objects": right(colours),
        "shapes": right(shapes),
        "tone": float(np.mean([tone == style.tone for tone, _ in grounds])),
        "texture": float(np.mean([texture == style.texture for _, texture in grounds])),
        "mean": float((mean[1:] - mean[0]).abs().mean()),
        "deviation": float((deviation[1:] - deviation[0]).abs().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16)
    args = parser.parse_args()
    model, scenes = load("pocket/sd"), contents(args.count)
    style = replace(next(stream(11))[0], tone="dark", texture="striped")
    grid, found = [], {}
    for name, setting in ROWS.items():
        pictures = [render(one) if setting is None else drawn(model, one, render(style), *setting) for one in scenes]
        grid.append(np.concatenate([render(style), *pictures[:SHOWN]], axis=1))
        found[name] = {key: round(value, 3) for key, value in scores(model, pictures, scenes, style).items()}
        print(name, found[name], flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    whole = Image.fromarray(np.concatenate(grid))
    whole.resize((2 * whole.width, 2 * whole.height), Image.Resampling.NEAREST).save(OUT / "styleid.png")
    write_json(
        OUT / "styleid.json",
        {"command": "python benchmarks/evidence/styleid.py", "steps": STEPS, "scenes": args.count, "rows": found},
    )


if __name__ == "__main__":
    main()
