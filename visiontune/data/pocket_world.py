"""The pocket world: small procedural scenes with exact ground truth.

A scene is one to three flat objects on a grey textured ground, 64x64 pixels. Everything a caption can say about it
(shape, colour, size, relation, count, ground) is known, so a model trained on it can be judged without another network
(see :mod:`visiontune.data.oracle`). *Subjects* (two-coloured patterned objects) and *styles* exist only for
fine-tuning: the pocket text-to-image model has never seen them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 44),
    "orange": (245, 138, 24),
    "yellow": (246, 222, 60),
    "green": (48, 160, 66),
    "cyan": (56, 200, 214),
    "blue": (44, 78, 208),
    "purple": (138, 58, 184),
    "pink": (246, 140, 190),
}
RADII = {"small": 8.0, "large": 13.0}
TONES = {"light": ((226, 226, 226), (204, 204, 204)), "dark": ((44, 44, 44), (70, 70, 70))}
TEXTURES = ("plain", "striped", "checked", "dotted")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three"}
PATTERNS = ("stripes", "bars", "checks", "core", "halves", "rim")
STYLES = ("flat", "outline", "pixel", "shaded", "hatched")
OPENINGS = ("", "a photo of ", "a picture of ")
TRIGGERS = ("sks", "zwx", "qrv", "vlp")
_SUPERSAMPLE = 4


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: centre ``(x, y)`` and radius in pixels; ``pattern`` and ``accent`` make it two-coloured."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    pattern: str = "solid"
    accent: str = ""

    @property
    def size(self) -> str:
        """The size word whose radius is nearest."""
        return min(RADII, key=lambda name: abs(RADII[name] - self.radius))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects in caption order, the ground they stand on, and the rendering style."""

    things: tuple[Thing, ...]
    tone: str = "light"
    texture: str = "plain"
    relation: str | None = None
    style: str = "flat"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A held-out individual: one shape whose two colours and pattern never occur in the training world."""

    name: str
    shape: str
    color: str
    accent: str
    pattern: str

    def thing(self, x: float, y: float, radius: float) -> Thing:
        """This subject standing at ``(x, y)``."""
        return Thing(
            shape=self.shape, color=self.color, x=x, y=y, radius=radius, pattern=self.pattern, accent=self.accent
        )


SUBJECTS: dict[str, Subject] = {
    s.name: s
    for s in (
        Subject(name="bumble", shape="circle", color="yellow", accent="purple", pattern="stripes"),
        Subject(name="domino", shape="square", color="cyan", accent="red", pattern="checks"),
        Subject(name="ember", shape="heart", color="orange", accent="blue", pattern="core"),
        Subject(name="lagoon", shape="star", color="blue", accent="yellow", pattern="halves"),
        Subject(name="poppy", shape="triangle", color="green", accent="pink", pattern="rim"),
        Subject(name="mallow", shape="cross", color="pink", accent="green", pattern="bars"),
    )
}


# ---------------------------------------------------------------------------------------------------- drawing


def outline(shape: str) -> np.ndarray:
    """Vertices ``[n, 2]`` of ``shape`` inside the unit circle, y pointing down."""
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.86
    if shape == "triangle":
        return np.array([(0, -0.95), (1, 0.8), (-1, 0.8)])
    if shape == "cross":
        a, b = 0.34, 1.0
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a)]
        return np.array([*corners, (-a, -a)])
    if shape == "star":
        angle = np.arange(10) * math.pi / 5 - math.pi / 2
        return np.stack([np.cos(angle), np.sin(angle)], 1) * np.where(np.arange(10) % 2, 0.45, 1.08)[:, None]
    angle = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    if shape == "circle":
        return np.stack([np.cos(angle), np.sin(angle)], 1)
    if shape == "heart":
        x = 16 * np.sin(angle) ** 3
        y = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle))
        return np.stack([x, y - 2.5], 1) / 15.5
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Anti-aliased share ``[64, 64]`` in [0, 1] of each pixel that the shape covers."""
    k = _SUPERSAMPLE
    canvas = Image.new("L", (SIZE * k, SIZE * k))
    points = (outline(shape) * radius + (x, y)) * k
    ImageDraw.Draw(canvas).polygon([(float(px), float(py)) for px, py in points], fill=255)
    return np.asarray(canvas.reduce(k), np.float32) / 255


def _accent_mask(thing: Thing) -> np.ndarray:
    """1 where the accent colour shows, in the object's own frame, so the pattern scales and moves with it."""
    grid = (np.arange(SIZE, dtype=np.float32) + 0.5)[None]
    u = (grid - thing.x) / thing.radius
    v = (grid.T - thing.y) / thing.radius
    u, v = np.broadcast_arrays(u, v)
    if thing.pattern == "stripes":
        return (np.floor((v + 1) * 2.0) % 2).astype(np.float32)
    if thing.pattern == "bars":
        return (np.floor((u + 1) * 2.0) % 2).astype(np.float32)
    if thing.pattern == "checks":
        return ((np.floor((u + 1) * 1.5) + np.floor((v + 1) * 1.5)) % 2).astype(np.float32)
    if thing.pattern == "core":
        return (u**2 + v**2 < 0.2).astype(np.float32)
    if thing.pattern == "halves":
        return (u > 0).astype(np.float32)
    if thing.pattern == "rim":
        return 1 - coverage(thing.shape, thing.x, thing.y, thing.radius * 0.55)
    raise ValueError(f"unknown pattern {thing.pattern!r}; known: solid, {', '.join(PATTERNS)}")


def paint(thing: Thing) -> np.ndarray:
    """The object's surface colour ``[64, 64, 3]`` in [0, 255], before it is cut out by its coverage."""
    color = np.broadcast_to(np.array(COLORS[thing.color], np.float32), (SIZE, SIZE, 3))
    if thing.pattern == "solid":
        return color
    mask = _accent_mask(thing)[..., None]
    return color * (1 - mask) + np.array(COLORS[thing.accent], np.float32) * mask


def ground(tone: str, texture: str) -> np.ndarray:
    """The textured grey ground, ``[64, 64, 3]`` in [0, 255]."""
    base, mark = (np.array(c, np.float32) for c in TONES[tone])
    i = np.arange(SIZE)
    on: np.ndarray = np.zeros((SIZE, SIZE))
    if texture == "striped":
        on = np.broadcast_to((i // 4 % 2)[:, None], (SIZE, SIZE))
    elif texture == "checked":
        on = (i[:, None] // 8 + i[None] // 8) % 2
    elif texture == "dotted":
        c = (i % 8 - 3.5) ** 2
        on = (c[:, None] + c[None]) < 4.5
    weight = on[..., None].astype(np.float32)
    return base * (1 - weight) + mark * weight


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: ``uint8 [64, 64, 3]`` RGB."""
    image = ground(scene.tone, scene.texture)
    for thing in scene.things:
        alpha, surface = _styled(thing, scene.style)
        image = image * (1 - alpha[..., None]) + surface * alpha[..., None]
    if scene.style == "pixel":
        image = image.reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean((1, 3)).repeat(4, 0).repeat(4, 1)
    return image.round().clip(0, 255).astype(np.uint8)


def _styled(thing: Thing, style: str) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and surface of one object drawn in ``style``."""
    alpha, surface = coverage(thing.shape, thing.x, thing.y, thing.radius), paint(thing)
    rows = np.arange(SIZE, dtype=np.float32)
    if style == "outline":
        alpha = alpha - coverage(thing.shape, thing.x, thing.y, thing.radius * 0.62)
    elif style == "shaded":
        light = 1.25 - 0.75 * ((rows[:, None] - thing.y + thing.radius) / (2 * thing.radius)).clip(0, 1)
        surface = (surface * light[..., None]).clip(0, 255)
    elif style == "hatched":
        surface = np.where((((rows[:, None] + rows[None]) // 2 % 3) == 0)[..., None], 255.0, surface)
    elif style not in ("flat", "pixel"):
        raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    return alpha.clip(0, 1), surface


# ---------------------------------------------------------------------------------------------------- sampling


def _radius(rng: np.random.Generator) -> float:
    return RADII["small" if rng.random() < 0.5 else "large"] + rng.uniform(-1, 1)


def _thing(rng: np.random.Generator, x: float, y: float, radius: float) -> Thing:
    shape, color = SHAPES[rng.integers(len(SHAPES))], list(COLORS)[rng.integers(len(COLORS))]
    return Thing(shape=shape, color=color, x=x, y=y, radius=radius)


def _spot(rng: np.random.Generator, radius: float) -> float:
    """A coordinate that keeps the whole object, and one pixel more, on the canvas."""
    return float(rng.uniform(radius + 2, SIZE - radius - 2))


def _pair_positions(rng: np.random.Generator, radii: tuple[float, float], relation: str) -> list[tuple[float, float]]:
    gap = rng.uniform(4, 8)
    room = SIZE - 2 * sum(radii) - gap - 4
    start = 2 + rng.uniform(0, max(room, 0))
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
        radius = RADII["small"] + rng.uniform(-1, 0)
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


# ---------------------------------------------------------------------------------------------------- captions


def held_out(caption: str) -> bool:
    """One caption in ten is never trained on; the choice depends on its words alone."""
    return zlib.crc32(caption.encode()) % 10 == 0


def caption(scene: Scene, rng: np.random.Generator, detail: float = 0.5) -> str:
    """Describe a scene, mentioning sizes and the ground each with probability ``detail``."""
    sizes = rng.random() < detail
    things = scene.things
    names = [article(" ".join(filter(None, (t.size if sizes else "", t.color, t.shape)))) for t in things]
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
    scene = sample_scene(rng)
    taboo = {(s.shape, s.color, s.accent, s.pattern) for s in SUBJECTS.values()}
    things = []
    for thing in scene.things:
        painted = replace(thing, pattern=PATTERNS[rng.integers(6)], accent=list(COLORS)[rng.integers(len(COLORS))])
        plain = rng.random() < 0.4 or (painted.shape, painted.color, painted.accent, painted.pattern) in taboo
        things.append(thing if plain else painted)
    style = STYLES[rng.integers(len(STYLES))] if rng.random() < 0.2 else "flat"
    return replace(scene, things=tuple(things), style=style)


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
