"""Prompts of the pocket world by what they ask to be put together, and the oracle as their judge.

A judge of colours asks for objects of the right shape and colour and overlooks what else is there, as the paper's
questions do; complex prompts and those of one and of three objects ask for everything and nothing more. Two objects
of `shape` have one colour, so that it cannot tell them; a texture is that of the ground.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from visiontune.evaluation.attributes import alike, recoloured, with_thing
from visiontune.evaluation.compose import Task, Verdict
from visiontune.pocket.asked import Shown, shown
from visiontune.pocket.scenes import article, caption, held_out, sample_scene
from visiontune.pocket.world import SHAPES, TEXTURES, Scene, render


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A category: scenes it asks for, their wrong twins, how much its captions say, and how its pictures are judged."""

    draw: Callable[[np.random.Generator], Scene]
    wrong: Callable[[Scene], Scene]
    suits: Callable[[Scene], bool] = lambda scene: True
    detail: float = 0.0  # enough that captions do not run out
    judged: Callable[[Shown], Verdict]


def _of(kind: str) -> Callable[[np.random.Generator], Scene]:
    return lambda rng: sample_scene(rng, kind)


def _apart(scene: Scene) -> bool:
    """Whether no two objects have a colour or a shape in common."""
    return all(len({getattr(t, field) for t in scene.things}) == len(scene.things) for field in ("color", "shape"))


def _one_color(rng: np.random.Generator) -> Scene:
    scene = sample_scene(rng, "two")
    return with_thing(scene, 1, color=scene.things[0].color)


def _reshaped(scene: Scene) -> Scene:
    """The first object in a shape that none has."""
    taken = {thing.shape for thing in scene.things}
    return with_thing(scene, 0, shape=next(shape for shape in SHAPES if shape not in taken))


def _retextured(scene: Scene) -> Scene:
    return replace(scene, texture=next(texture for texture in TEXTURES if texture != scene.texture))


def _exchanged(scene: Scene) -> Scene:
    """Either object in the other's place."""
    one, other = scene.things
    return replace(scene, things=(replace(one, x=other.x, y=other.y), replace(other, x=one.x, y=one.y)))


def _recounted(scene: Scene) -> Scene:
    """One object less."""
    return replace(scene, things=scene.things[:-1])


def _things(found: Shown) -> Verdict:
    return Verdict(right=float(all(found.things)), graded=float(np.mean(found.things)))


def _ground(found: Shown) -> Verdict:
    assert found.ground is not None
    return Verdict(right=float(all(found.ground)), graded=float(np.mean(found.ground)))


def _relation(found: Shown) -> Verdict:
    """Graded as in the paper: a quarter for each object, half for how they stand where both are there."""
    return Verdict(right=float(bool(found.relation)), graded=sum(found.things) / 4 + float(bool(found.relation)) / 2)


def _number(found: Shown) -> Verdict:
    """Graded as in the paper: half for the object, half for its number."""
    exact = found.count and all(found.things)
    return Verdict(right=float(exact), graded=(any(found.things) + exact) / 2)


def _everything(found: Shown) -> Verdict:
    parts = [*found.things, *([] if found.relation is None else [found.relation]), *(found.ground or ())]
    return Verdict(right=float(found.everything), graded=float(np.mean(parts)))


def _objects(found: Shown) -> Verdict:
    """All objects and no more, whatever they stand on."""
    return Verdict(right=float(found.count and all(found.things)), graded=float(np.mean(found.things)))


def _swapped(scene: Scene) -> Scene:
    return recoloured(scene, 0, 1)


_KINDS = {
    "colour": _Kind(draw=_of("two"), wrong=_swapped, suits=_apart, judged=_things),
    "shape": _Kind(
        draw=_one_color,
        wrong=_reshaped,
        suits=lambda scene: scene.things[0].shape != scene.things[1].shape,
        judged=_things,
    ),
    "texture": _Kind(draw=_of("one"), wrong=_retextured, detail=1.0, judged=_ground),
    "spatial": _Kind(draw=_of("two"), wrong=_exchanged, suits=_apart, judged=_relation),
    "numeracy": _Kind(draw=_of("many"), wrong=_recounted, suits=alike, detail=0.5, judged=_number),
    "complex": _Kind(draw=_of("two"), wrong=_swapped, suits=_apart, detail=1.0, judged=_everything),
    "one": _Kind(draw=_of("one"), wrong=_reshaped, detail=0.5, judged=_objects),
    "three": _Kind(draw=_of("three"), wrong=_swapped, suits=_apart, judged=_objects),
}
CATEGORIES = tuple(_KINDS)


def tasks(count: int, seed: int = 707, holdout: bool = True) -> list[Task]:
    """Prompts, ``count`` of each category and each once: those that are never trained on, or none of them."""
    found: list[Task] = []
    for i, (name, kind) in enumerate(_KINDS.items()):
        rng, own = np.random.default_rng([seed, i]), dict[str, Task]()
        while len(own) < count:
            scene = kind.draw(rng)
            text = caption(scene, rng, kind.detail)
            if kind.suits(scene) and held_out(text) == holdout and text not in own:
                own[text] = Task(
                    category=name,
                    prompt=text,
                    phrases=_phrases(scene),
                    truth=partial(render, scene),
                    wrong=partial(render, kind.wrong(scene)),
                )
        found += own.values()
    return found


def _phrases(scene: Scene) -> tuple[str, ...]:
    """The objects, each by itself."""
    return tuple(article(f"{thing.color} {thing.shape}") for thing in scene.things)


class Oracle:
    """Judges 64x64 pictures by :func:`visiontune.pocket.asked.shown`, as the category asks."""

    def __call__(self, pictures: np.ndarray, tasks: Sequence[Task]) -> list[Verdict]:
        return [
            _KINDS[task.category].judged(shown(picture, task.prompt))
            for picture, task in zip(pictures, tasks, strict=True)
        ]
