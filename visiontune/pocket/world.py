"""The pocket world: small procedural scenes with exact ground truth.

A scene is one to three flat objects on a grey textured ground, 64x64 pixels. Everything a caption can say about it
(shape, colour, size, relation, count, ground) is known, so a model trained on it can be judged without another network
(:mod:`visiontune.pocket.oracle`). *Subjects* (two-coloured individuals) and *styles* exist only for fine-tuning: the
pocket text-to-image model has seen patterns, but none with a subject's two colours, nor those colours on its shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
RADII = {"small": 9.0, "large": 13.0}
TONES = {"light": ((226, 226, 226), (204, 204, 204)), "dark": ((44, 44, 44), (70, 70, 70))}
TEXTURES = ("plain", "striped", "checked", "dotted")
RELATIONS = ("left of", "right of", "above", "below")
PATTERNS = ("stripes", "bars", "checks", "core", "halves", "rim")
STYLES = ("flat", "outline", "pixel", "shaded", "hatched")
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
    """A held-out individual: the training world never shows its two colours on its shape or in its pattern."""

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
