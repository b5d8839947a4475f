"""Scenes and captions of the pocket world, drawn at random: what its models are trained on and judged by."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from visiontune.pocket.world import (
    COLORS,
    PATTERNS,
    RADII,
    RELATIONS,
    SHAPES,
    SIZE,
    STYLES,
    SUBJECTS,
    TEXTURES,
    TONES,
    Scene,
    Subject,
    Thing,
)

NUMBERS = {2: "two", 3: "three"}
OPENINGS = ("", "a photo of ", "a picture of ")
TRIGGERS = ("sks", "zwx", "qrv", "vlp")


# ---------------------------------------------------------------------------------------------------- sampling


def _radius(rng: np.random.Generator) -> float:
    return RADII["small" if rng.random() < 0.5 else "large"] + rng.uniform(-0.75, 0.75)


def _thing(rng: np.random.Generator, x: float, y: float, radius: float) -> Thing:
    shape, color = SHAPES[rng.integers(len(SHAPES))], list(COLORS)[rng.integers(len(COLORS))]
    return Thing(shape=shape, color=color, x=x, y=y, radius=radius)


def _spot(rng: np.random.Generator, radius: float) -> float:
    """A coordinate that keeps the whole object, and one pixel more, on the canvas."""
    return float(rng.uniform(radius + 2, SIZE - radius - 2))


def _pair_positions(rng: np.random.Generator, radii: tuple[float, float], relation: str) -> list[tuple[float, float]]:
    room = SIZE - 2 * sum(radii) - 4
    gap = min(rng.uniform(4, 8), room)
    start = 2 + rng.uniform(0, room - gap)
    first, second = start + radii[0], start + 2 * radii[0] + gap + radii[1]
    if relation in ("right of", "below"):
        first, second = SIZE - first, SIZE - second
    middle = rng.uniform(24, 40)
    across = [float(np.clip(middle + rng.uniform(-5, 5), r + 2, SIZE - r - 2)) for r in radii]
    along = (first, second)
    return [(a, c) if relation in ("left of", "right of") else (c, a) for a, c in zip(along, across, strict=True)]


def _triple_positions(rng: np.random.Generator) -> list[tuple[float, float]]:
    """Three small objects at the corners of a jittered triangle, or in a row."""
    layouts = ([(11, 32), (32, 32), (53, 32)], [(15, 16), (49, 16), (32, 48)], [(15, 48), (49, 48), (32, 16)])
    spots = [(x + rng.uniform(-0.5, 0.5), y + rng.uniform(-5, 5)) for x, y in layouts[rng.integers(3)]]
    return [spots[i] for i in rng.permutation(3)]


def sample_scene(rng: np.random.Generator, kind: str | None = None) -> Scene:
    """Draw a training scene.

    Args:
        rng: source of randomness.
        kind: ``one``, ``two`` (with a relation), ``many`` (two or three alike) or ``three`` (all different); drawn
            with probabilities 0.35, 0.45, 0.12, 0.08 when omitted.
    """
    kind = kind or str(rng.choice(["one", "two", "many", "three"], p=[0.35, 0.45, 0.12, 0.08]))
    relation = None
    if kind == "one":
        radius = _radius(rng)
        things = [_thing(rng, _spot(rng, radius), _spot(rng, radius), radius)]
    elif kind == "two":
        relation = RELATIONS[rng.integers(4)]
        radii = (_radius(rng), _radius(rng))
        things = [_thing(rng, x, y, r) for (x, y), r in zip(_pair_positions(rng, radii, relation), radii, strict=True)]
    elif kind in ("many", "three"):
        radius = RADII["small"] + rng.uniform(-0.75, 0)
        things = [_thing(rng, x, y, radius) for x, y in _triple_positions(rng)]
        if kind == "many":
            alike = things[: rng.integers(2, 4)]
            things = [replace(t, shape=things[0].shape, color=things[0].color) for t in alike]
    else:
        raise ValueError(f"unknown kind of scene {kind!r}; known: one, two, many, three")
    tone, texture = list(TONES)[rng.integers(2)], TEXTURES[rng.integers(4)]
    return Scene(things=tuple(things), tone=tone, texture=texture, relation=relation)


def subject_scene(subject: Subject, rng: np.random.Generator, style: str = "flat") -> Scene:
    """The subject alone, anywhere on any ground: what a user's photographs of it are."""
    radius = RADII["large"] + rng.uniform(-1, 2)
    thing = subject.thing(_spot(rng, radius), _spot(rng, radius), radius)
    return Scene(things=(thing,), tone=list(TONES)[rng.integers(2)], texture=TEXTURES[rng.integers(4)], style=style)


def individual(rng: np.random.Generator) -> Subject:
    """A subject of chance that shares the two colours and the shape or the pattern with no held-out one."""
    while True:
        color, accent = (str(one) for one in rng.choice([*COLORS], 2, replace=False))
        shape, pattern = SHAPES[rng.integers(len(SHAPES))], PATTERNS[rng.integers(len(PATTERNS))]
        name = f"{color} and {accent} {shape} with {pattern}"
        made = Subject(name=name, shape=shape, color=color, accent=accent, pattern=pattern)
        if not _like_a_subject(made.thing(0, 0, 1)):
            return made


def _like_a_subject(thing: Thing) -> bool:
    """Whether the object has the two colours of a held-out subject, on its shape or in its pattern."""
    colors = {thing.color, thing.accent}
    return any(
        colors == {s.color, s.accent} and (thing.shape == s.shape or thing.pattern == s.pattern)
        for s in SUBJECTS.values()
    )


def patterned(scene: Scene, rng: np.random.Generator, share: float) -> Scene:
    """The scene with a second colour and a pattern on each object with probability ``share``.

    An object that would come near a held-out subject stays plain.
    """
    things = []
    for thing in scene.things:
        accent = str(rng.choice([color for color in COLORS if color != thing.color]))
        painted = replace(thing, pattern=PATTERNS[rng.integers(len(PATTERNS))], accent=accent)
        things.append(painted if rng.random() < share and not _like_a_subject(painted) else thing)
    return replace(scene, things=tuple(things))


# ---------------------------------------------------------------------------------------------------- captions


def held_out(caption: str) -> bool:
    """One caption in ten is never trained on; the choice depends on its words alone."""
    return zlib.crc32(caption.encode()) % 10 == 0


def caption(scene: Scene, rng: np.random.Generator, detail: float = 0.5) -> str:
    """Describe a scene, mentioning sizes and the ground each with probability ``detail``."""
    sizes = rng.random() < detail
    things = scene.things
    names = [article(" ".join(filter(None, (t.size if sizes else "", _colors(t), t.shape)))) for t in things]
    if scene.relation:
        text = f"{names[0]} {scene.relation} {names[1]}"
    elif len(things) == 1:
        text = names[0]
    elif len({(t.shape, t.color) for t in things}) == 1:
        text = f"{NUMBERS[len(things)]} {things[0].color} {plural(things[0].shape)}"
    else:
        text = f"{', '.join(names[:-1])} and {names[-1]}"
    if rng.random() < detail:
        text += f" on a {scene.tone} {scene.texture} background"
    return OPENINGS[rng.choice(3, p=[0.6, 0.2, 0.2])] + text


def phrases(scene: Scene) -> dict[str, list[int]]:
    """The words that a caption has for each kind of object, their colours and shape, and which objects they are."""
    number = len(scene.things)
    alike = number > 1 and not scene.relation and len({(t.shape, t.color) for t in scene.things}) == 1
    found: dict[str, list[int]] = {}
    for i, thing in enumerate(scene.things):
        found.setdefault(f"{_colors(thing)} {plural(thing.shape) if alike else thing.shape}", []).append(i)
    return found


def _colors(thing: Thing) -> str:
    return f"{thing.color} and {thing.accent}" if thing.accent else thing.color


def article(phrase: str) -> str:
    """A noun phrase with its indefinite article in front."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(shape: str) -> str:
    """The plural of a shape word."""
    return shape + ("es" if shape.endswith("s") else "s")


def codec_scene(rng: np.random.Generator) -> Scene:
    """A scene for image codecs: any pattern, colours and style, so that a VAE can code what fine-tuning brings.

    The held-out subjects themselves are never drawn.
    """
    scene = patterned(sample_scene(rng), rng, 0.6)
    style = STYLES[rng.integers(len(STYLES))] if rng.random() < 0.2 else "flat"
    return replace(scene, style=style)


def stream(seed: int, kind: str | None = None, holdout: bool = False) -> Iterator[tuple[Scene, str]]:
    """Endless ``(scene, caption)`` pairs: the training world, or the held-out captions alone."""
    rng = np.random.default_rng(seed)
    while True:
        scene = sample_scene(rng, kind)
        text = caption(scene, rng)
        if held_out(text) == holdout:
            yield scene, text


def vocabulary() -> list[str]:
    """Every word a caption can hold, and the trigger words that no caption holds."""
    words = {"a", "an", "and", "of", "on", "the", ",", "photo", "picture", "background", "left", "right", "above"}
    words |= {"below", "drawing", "in", "style", "with", *SHAPES, *map(plural, SHAPES), *COLORS, *RADII, *TONES}
    return sorted(words | set(TEXTURES) | set(NUMBERS.values()) | set(STYLES)) + list(TRIGGERS)
