"""The oracle: reads a pocket-world image back into objects with plain image processing, no network.

Grounds are grey and objects are saturated, so objects are the connected components of the chroma mask. A component's
colour is the palette entry that most of its pixels are nearest to; its shape is the template of its own extent that
overlaps it best; a subject is recognised by comparing the component with renders of every subject and of every solid
object in its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from visiontune.pocket.scenes import NUMBERS, plural
from visiontune.pocket.world import (
    COLORS,
    RADII,
    RELATIONS,
    SHAPES,
    SIZE,
    SUBJECTS,
    TONES,
    Subject,
    Thing,
    coverage,
    outline,
    paint,
)

MIN_AREA = 40
MIN_OVERLAP = 0.6
MAX_RADIUS = 20.0
CHROMA_THRESHOLD = 38.0
EDGE_SHARE = 0.4
_PALETTE = np.array(list(COLORS.values()), np.float32)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One object read from an image; ``overlap`` in [0, 1] says how well it matches its shape."""

    thing: Thing
    overlap: float
    purity: float
    mask: np.ndarray

    @property
    def valid(self) -> bool:
        """Whether the component is a clean object rather than a smear or a flooded canvas."""
        return self.overlap >= MIN_OVERLAP and self.thing.radius <= MAX_RADIUS


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One object a caption asks for; ``None`` means that the caption leaves it open."""

    shape: str
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caption asks for."""

    things: tuple[Wanted, ...]
    relation: str | None = None


# ---------------------------------------------------------------------------------------------------- captions

_NOUN = {s: s for s in SHAPES} | {plural(s): s for s in SHAPES}
_NOUN_PHRASE = re.compile(
    rf"\b(?:(?P<number>{'|'.join(NUMBERS.values())})\s+)?(?:(?P<size>{'|'.join(RADII)})\s+)?"
    rf"(?:(?P<color>{'|'.join(COLORS)})\s+)?(?P<noun>{'|'.join(sorted(_NOUN, key=len, reverse=True))})\b"
)


def read_caption(caption: str) -> Request:
    """Parse a caption of the pocket world's grammar (other words, such as a trigger, are passed over).

    Raises:
        ValueError: if the caption names no object.
    """
    counts = {word: n for n, word in NUMBERS.items()}
    things: list[Wanted] = []
    for match in _NOUN_PHRASE.finditer(caption.lower()):
        wanted = Wanted(shape=_NOUN[match["noun"]], color=match["color"], size=match["size"])
        things += [wanted] * counts.get(match["number"], 1)
    if not things:
        raise ValueError(f"caption {caption!r} names no object; name one of: {', '.join(SHAPES)}")
    relation = next((r for r in RELATIONS if r in caption.lower()), None)
    return Request(things=tuple(things), relation=relation if len(things) == 2 else None)


# ---------------------------------------------------------------------------------------------------- reading


def _chroma(image: np.ndarray) -> np.ndarray:
    """Spread between the largest and the smallest channel, per pixel: 0 on any grey."""
    return image.max(-1) - image.min(-1)


def _shape_of(mask: np.ndarray) -> tuple[str, float, float, float, float]:
    """Best shape for a boolean mask, with its overlap (IoU), centre x, y and radius."""
    rows, cols = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    top, left = int(rows[0]), int(cols[0])
    height, width = int(rows[-1]) - top + 1, int(cols[-1]) - left + 1
    best = ("", -1.0, 0.0, 0.0, 0.0)
    for shape in SHAPES:
        points = outline(shape)
        low, high = points.min(0), points.max(0)
        radius = (width / (high[0] - low[0]) + height / (high[1] - low[1])) / 2
        x = left + width / 2 - radius * (low[0] + high[0]) / 2
        y = top + height / 2 - radius * (low[1] + high[1]) / 2
        template = coverage(shape, x, y, radius) > 0.5
        overlap = float((mask & template).sum() / max((mask | template).sum(), 1))
        if overlap > best[1]:
            best = (shape, overlap, x, y, radius)
    return best


def read(image: np.ndarray) -> list[Found]:
    """Objects in an image ``uint8 [64, 64, 3]``, largest first.

    Components smaller than ``MIN_AREA`` pixels are taken for noise.
    """
    pixels = np.asarray(image, np.float32)
    if pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the oracle reads images of shape (64, 64, 3), not {pixels.shape}")
    chroma = _chroma(pixels)
    labels, n = ndimage.label(chroma > CHROMA_THRESHOLD)
    found = []
    for index in range(1, n + 1):
        mask = labels == index
        if mask.sum() < MIN_AREA:
            continue
        # A blurred edge is where the chroma has fallen to a share of the object's own, not where it has vanished.
        mask &= chroma > EDGE_SHARE * np.percentile(chroma[mask], 90)
        mask = ndimage.binary_fill_holes(mask)
        shape, overlap, x, y, radius = _shape_of(mask)
        core = ndimage.binary_erosion(mask) if mask.sum() > 2 * MIN_AREA else mask
        nearest = ((pixels[core][:, None] - _PALETTE) ** 2).sum(-1).argmin(-1)
        votes = np.bincount(nearest, minlength=len(COLORS))
        color = list(COLORS)[int(votes.argmax())]
        thing = Thing(shape=shape, color=color, x=x, y=y, radius=radius)
        found.append(Found(thing=thing, overlap=overlap, purity=float(votes.max() / votes.sum()), mask=mask))
    return sorted(found, key=lambda f: -int(f.mask.sum()))


# ---------------------------------------------------------------------------------------------------- judging


def _fits(found: Found, wanted: Wanted) -> bool:
    thing = found.thing
    return (
        found.valid
        and thing.shape == wanted.shape
        and wanted.color in (None, thing.color)
        and wanted.size in (None, thing.size)
    )


def _holds(relation: str | None, first: Thing, second: Thing) -> bool:
    margin = 4
    return {
        None: True,
        "left of": first.x + margin < second.x,
        "right of": first.x > second.x + margin,
        "above": first.y + margin < second.y,
        "below": first.y > second.y + margin,
    }[relation]


def _assignments(found: list[Found], wanted: tuple[Wanted, ...]) -> list[list[Found]]:
    """Every way to give each wanted object a found one of its own."""
    if not wanted:
        return [[]]
    return [
        [item, *rest]
        for i, item in enumerate(found)
        if _fits(item, wanted[0])
        for rest in _assignments(found[:i] + found[i + 1 :], wanted[1:])
    ]


def matches(image: np.ndarray, caption: str | Request) -> bool:
    """Whether an image ``uint8 [64, 64, 3]`` shows just what its caption asks: objects, count, relation."""
    request = read_caption(caption) if isinstance(caption, str) else caption
    found = read(image)
    if len(found) != len(request.things):
        return False
    ways = _assignments(found, request.things)
    return any(len(w) < 2 or _holds(request.relation, w[0].thing, w[1].thing) for w in ways)


# ---------------------------------------------------------------------------------------------------- subjects


def likeness(image: np.ndarray, found: Found, subject: Subject) -> float:
    """How much one found object looks like a subject, in [0, 1]: shape overlap times colour agreement.

    The subject is drawn at the found object's place and size; colour agreement is one minus the mean RGB distance over
    the found object's pixels, in units of half the cube's diagonal.
    """
    t = found.thing
    own = replace(subject.thing(t.x, t.y, t.radius))
    template = coverage(own.shape, own.x, own.y, own.radius) > 0.5
    overlap = (found.mask & template).sum() / max((found.mask | template).sum(), 1)
    distance = np.sqrt(((image[found.mask].astype(np.float32) - paint(own)[found.mask]) ** 2).sum(-1)).mean()
    return float(overlap * max(0.0, 1 - distance / (255 * 3**0.5 / 2)))


def subject_fidelity(image: np.ndarray, subject: Subject) -> float:
    """Likeness of the image's best object to a subject, in [0, 1]; 0 when there is no object."""
    return max((likeness(image, f, subject) for f in read(image)), default=0.0)


def recognise(image: np.ndarray) -> str | None:
    """Name of the subject in an image, or ``None`` when a plain object explains the picture better."""
    best_name, best = None, 0.0
    for found in read(image):
        plain = Subject(
            name="", shape=found.thing.shape, color=found.thing.color, accent=found.thing.color, pattern="halves"
        )
        floor = likeness(image, found, plain)
        for name, subject in SUBJECTS.items():
            score = likeness(image, found, subject)
            if score > max(best, floor):
                best_name, best = name, score
    return best_name


def ground_of(image: np.ndarray) -> str:
    """``light`` or ``dark``: the tone of the ground, from the median grey outside all objects."""
    pixels = np.asarray(image, np.float32)
    outside = _chroma(pixels) <= CHROMA_THRESHOLD
    level = float(np.median(pixels[outside].mean(-1))) if outside.any() else 0.0
    return min(TONES, key=lambda tone: abs(level - TONES[tone][0][0]))
