"""Objects put into given scenes and taken out of them, on pocket-sd, by terms of guidance and by FreeCompose.

    visiontune train personalise/lora data.root=pocket/bumble out=runs name=bumble
    python benchmarks/evidence/compose.py --adapter runs/bumble/adapter.safetensors

Every scene has one object; the subject is to stand on its other side, where a plain circle of its first colour is
pasted for a start. Writes ``shine.png`` and ``freecompose.png`` (a scene a column, a setting a row) and one ``.json``
beside each into ``samples/guidance``: how often the subject is in the box, how like it the best object there is, how
often the scene's own object has its shape and colour, and how far pixels outside of the box are from the scene's (PSNR
in dB, mean).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visiontune import adapters
from visiontune.composition import freecompose
from visiontune.core import Request
from visiontune.files import write_json
from visiontune.guidance import cfg, inpaint, seg, shine
from visiontune.guidance.base import Term
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load
from visiontune.pocket import oracle
from visiontune.pocket.scenes import stream
from visiontune.pocket.world import SUBJECTS, Scene, Thing, coverage, render

OUT = Path(__file__).parents[2] / "samples/guidance"
SUBJECT, STEPS, RADIUS = SUBJECTS["bumble"], 14, 12.0
Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A scene, and where the subject shall stand in it: left, top, width and height of its box."""

    scene: Scene
    place: tuple[float, float]

    @property
    def box(self) -> Box:
        x, y = self.place
        return int(x - RADIUS) - 1, int(y - RADIUS) - 1, int(2 * RADIUS) + 3, int(2 * RADIUS) + 3

    @property
    def thing(self) -> Thing:
        return self.scene.things[0]

    def shown(self, *things: Thing) -> np.ndarray:
        return render(replace(self.scene, things=(self.thing, *things)))

    def prompt(self, name: str) -> str:
        """Of the subject alone: the scene's own object is kept, and not drawn."""
        return f"a photo of a {name} on a {self.scene.tone} {self.scene.texture} background"


def tasks(count: int) -> list[Task]:
    """Scenes whose object stands in the left or the right half, clear of the other."""
    found: list[Task] = []
    for scene, _ in stream(21, "one"):
        (thing,) = scene.things
        free = thing.x + thing.radius < 34 or thing.x - thing.radius > 30
        if thing.shape != SUBJECT.shape and free:
            found.append(Task(scene=scene, place=(48.0 if thing.x < 32 else 16.0, 32.0)))
        if len(found) == count:
            break
    return found


def outside(box: Box) -> np.ndarray:
    """Pixels [64, 64] that are no part of what a latent of the box shows."""
    left, top, width, height = box
    mask = np.ones((64, 64), bool)
    mask[max(top - 4, 0) : top + height + 4, max(left - 4, 0) : left + width + 4] = False
    return mask


def psnr(one: np.ndarray, other: np.ndarray, where: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(((one.astype(float) - other) ** 2)[where].mean(), 1e-9)))


def judged(picture: np.ndarray, task: Task) -> dict[str, float]:
    left, top, width, height = task.box
    objects = oracle.read(picture)

    def inside(found: oracle.Found) -> bool:
        return left <= found.thing.x <= left + width and top <= found.thing.y <= top + height

    mine = [one for one in objects if inside(one)]
    kept = [one for one in objects if not inside(one)]
    same = [(one.thing.shape, one.thing.color) == (task.thing.shape, task.thing.color) for one in kept]
    return {
        "subject": float(any(oracle.recognise_object(picture, one) == SUBJECT.name for one in mine)),
        "likeness": max((oracle.likeness(picture, one, SUBJECT) for one in mine), default=0.0),
        "kept": float(same == [True]),
        "psnr": psnr(picture, task.shown(), outside(task.box)),
    }


def drawn(model: Any, task: Task, terms: Callable[[Task], Sequence[Term]]) -> np.ndarray:
    request = Request(prompt=task.prompt("sks circle"), seed=0)
    stack = GuidanceStack([cfg.Config(scale=4.0), *terms(task)])
    picture: np.ndarray = model.draw([request], steps=STEPS, guidance=stack, sampler="ddim")[0]
    return (picture * 255).round().astype(np.uint8)


def rough(task: Task) -> Image.Image:
    x, y = task.place
    return Image.fromarray(task.shown(Thing(shape=SUBJECT.shape, color=SUBJECT.color, x=x, y=y, radius=RADIUS)))


def placed(task: Task, **options: Any) -> shine.Config:
    given = {"picture": rough(task), "mask": task.box, "subject": "circle", "layers": ["up_blocks.0"]}
    return shine.Config(**{**given, "source": task.prompt("yellow circle"), **options})


ROWS: dict[str, Callable[[Task], Sequence[Term]]] = {
    "inpaint": lambda task: [inpaint.Config(picture=rough(task), mask=task.box)],
    "shine without a pull": lambda task: [placed(task, pull=[])],
    "shine": lambda task: [placed(task)],
    "shine and seg": lambda task: [placed(task), seg.Config(scale=0.7, sigma=10, layers="all", window=(0, 0.7))],
}


def means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(float(np.mean([one[key] for one in found])), 3) for key in found[0]}


def save(name: str, command: str, grid: Sequence[Sequence[np.ndarray]], rows: Any) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    whole = Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in grid]))
    whole.resize((2 * whole.width, 2 * whole.height), Image.Resampling.NEAREST).save(OUT / f"{name}.png")
    write_json(OUT / f"{name}.json", {"command": command, "scenes": len(grid[0]), "rows": rows})


def subjects(model: Any, count: int, command: str) -> None:
    """The subject in the box, by terms of guidance."""
    given = tasks(count)
    pasted = [task.shown(SUBJECT.thing(*task.place, RADIUS)) for task in given]
    grid = [[task.shown() for task in given], [np.asarray(rough(task)) for task in given], pasted]
    rows = {"paste": means([judged(one, task) for one, task in zip(pasted, given, strict=True)])}
    for name, terms in ROWS.items():
        pictures = [drawn(model, task, terms) for task in given]
        grid.append(pictures)
        rows[name] = means([judged(one, task) for one, task in zip(pictures, given, strict=True)])
        print(name, rows[name], flush=True)
        save("shine", command, grid, rows)


def removed(model: Any, task: Task, how: freecompose.Optimisation) -> tuple[np.ndarray, dict[str, float]]:
    """The scene without its object, which the prompts name: the paper's words are none that this model knows."""
    own, ground = task.thing, f"on a {task.scene.tone} {task.scene.texture} background"
    mask = (coverage(own.shape, own.x, own.y, own.radius + 2) > 0).astype(float)
    origin = f"a {own.color} {own.shape} {ground}"
    found = freecompose.remove(model, task.shown() / 255, mask, origin=origin, target=ground, how=how)
    picture = (found.picture * 255).round().astype(np.uint8)
    left = any(bool((one.mask & (mask > 0)).any()) for one in oracle.read(picture))
    bare = render(replace(task.scene, things=()))
    return picture, {
        "gone": float(not left),
        "inside": psnr(picture, bare, mask > 0),
        "before": psnr(task.shown(), bare, mask > 0),
        "psnr": psnr(picture, bare, mask == 0),
    }


def harmonised(model: Any, task: Task, how: freecompose.Optimisation) -> tuple[np.ndarray, dict[str, float]]:
    """The subject, pasted and harmonised under a prompt that names what is there."""
    pasted = task.shown(SUBJECT.thing(*task.place, RADIUS))
    mask = coverage(SUBJECT.shape, *task.place, RADIUS).astype(float)
    own, side = task.thing, "left of" if task.place[0] < task.thing.x else "right of"
    ground = f"on a {task.scene.tone} {task.scene.texture} background"
    target = f"a yellow and purple circle {side} a {own.color} {own.shape} {ground}"
    found = freecompose.harmonise(model, pasted / 255, mask, target=target, how=how)
    picture = (found.picture * 255).round().astype(np.uint8)
    return picture, judged(picture, task)


def composites(model: Any, count: int, iterations: int, command: str) -> None:
    """A scene's object removed, and a pasted subject harmonised, by FreeCompose."""
    given, how = tasks(count), freecompose.Optimisation(iterations=iterations)
    grid, rows = [[task.shown() for task in given]], {}
    for work in (removed, harmonised):
        found = [work(model, task, how) for task in given]
        grid.append([picture for picture, _ in found])
        rows[work.__name__] = means([scores for _, scores in found])
        print(work.__name__, rows[work.__name__], flush=True)
        save("freecompose", command, grid, {"iterations": iterations, **rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="of bumble; without one only FreeCompose is tried")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--composites", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=100)
    args = parser.parse_args()
    model = load("pocket/sd")
    if args.composites:
        command = f"python benchmarks/evidence/compose.py --composites {args.composites} --iterations {args.iterations}"
        composites(model, args.composites, args.iterations, command)
    if args.adapter:
        adapters.load(model.networks(), args.adapter).eval()
        command = (
            f"python benchmarks/evidence/compose.py --adapter runs/bumble/adapter.safetensors --count {args.count}"
        )
        subjects(model, args.count, command)


if __name__ == "__main__":
    main()
