"""The oracle: reads a pocket-world image back into objects with plain image processing, no network.

Grounds are grey and objects are saturated, so objects are the connected components of the chroma mask. A component's
colour is the palette entry that most of its pixels are nearest to; its shape is the template of its own extent that
overlaps it best; a subject is recognised where no other paint and no other shape in its place would look more like the
component.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from visiontune.pocket.scenes import NUMBERS, plural
from visiontune.pocket.world import (
    COLORS,
    PATTERNS,
    RADII,
    RELATIONS,
    SHAPES,
    SIZE,
    SUBJECTS,
    TEXTURES,
    TONES,
    Subject,
    Thing,
    coverage,
    ground,
    outline,
    paint,
)

MIN_AREA = 40
# Of an object's pixels, the share that its colours must have, and the least that each of two must have.
PURE, TOUCH = 0.9, 0.1
MIN_OVERLAP = 0.6
MAX_RADIUS = 20.0
CHROMA_THRESHOLD = 38.0
EDGE_SHARE = 0.4
_PALETTE = np.array(list(COLORS.values()), np.float32)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One object read from an image.

    Attributes:
        thing: shape, main colour, place and size.
        overlap: in [0, 1], how well it matches its shape.
        shares: share of its inner pixels that is nearest to each colour.
        mask: where it is, bool [64, 64].
    """

    thing: Thing
    overlap: float
    shares: dict[str, float]
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
    accent: str | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caption asks for; ``ground`` is a tone and a texture."""

    things: tuple[Wanted, ...]
    relation: str | None = None
    ground: tuple[str, str] | None = None


# ---------------------------------------------------------------------------------------------------- captions

_NOUN = {s: s for s in SHAPES} | {plural(s): s for s in SHAPES}
_NOUN_PHRASE = re.compile(
    rf"\b(?:(?P<number>{'|'.join(NUMBERS.values())})\s+)?(?:(?P<size>{'|'.join(RADII)})\s+)?"
    rf"(?:(?P<color>{'|'.join(COLORS)})\s+(?:and\s+(?P<accent>{'|'.join(COLORS)})\s+)?)?"
    rf"(?P<noun>{'|'.join(sorted(_NOUN, key=len, reverse=True))})\b"
)
_GROUND = re.compile(rf"\bon a (?P<tone>{'|'.join(TONES)}) (?P<texture>{'|'.join(TEXTURES)}) background\b")


def read_caption(caption: str) -> Request:
    """Parse a caption of the pocket world's grammar (other words, such as a trigger, are passed over).

    Raises:
        ValueError: if the caption names no object.
    """
    counts = {word: n for n, word in NUMBERS.items()}
    things: list[Wanted] = []
    for match in _NOUN_PHRASE.finditer(caption.lower()):
        wanted = Wanted(shape=_NOUN[match["noun"]], color=match["color"], size=match["size"], accent=match["accent"])
        things += [wanted] * counts.get(match["number"], 1)
    if not things:
        raise ValueError(f"caption {caption!r} names no object; name one of: {', '.join(SHAPES)}")
    relation = next((r for r in RELATIONS if r in caption.lower()), None)
    stands = _GROUND.search(caption.lower())
    return Request(
        things=tuple(things),
        relation=relation if len(things) == 2 else None,
        ground=(stands["tone"], stands["texture"]) if stands else None,
    )


# ---------------------------------------------------------------------------------------------------- reading


def _chroma(image: np.ndarray) -> np.ndarray:
    """Spread between the largest and the smallest channel, per pixel: 0 on any grey."""
    return image.max(-1) - image.min(-1)


def colored(image: np.ndarray) -> np.ndarray:
    """Where a picture ``[64, 64, 3]`` has colours, which objects have and grounds have not: bool ``[64, 64]``."""
    return _chroma(np.asarray(image, np.float32)) > CHROMA_THRESHOLD


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


def _nearest_colors(pixels: np.ndarray, level: float) -> np.ndarray:
    """Number of the palette's colour that each pixel ``[n, 3]`` is nearest to, however much grey of ``level`` it has.

    Along a blurred edge a colour turns into the ground's grey, and passes by others on its way.
    """
    ways = _PALETTE - level
    along = (((pixels[:, None] - level) * ways).sum(-1) / (ways**2).sum(-1)).clip(0, 1)
    return ((pixels[:, None] - level - along[..., None] * ways) ** 2).sum(-1).argmin(-1)


def read(image: np.ndarray) -> list[Found]:
    """Objects in an image ``uint8 [64, 64, 3]``, largest first.

    Components smaller than ``MIN_AREA`` pixels are taken for noise.
    """
    pixels = np.asarray(image, np.float32)
    if pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the oracle reads images of shape (64, 64, 3), not {pixels.shape}")
    chroma = _chroma(pixels)
    outside = chroma <= CHROMA_THRESHOLD
    level = float(np.median(pixels[outside])) if outside.any() else 0.0
    labels, n = ndimage.label(~outside)
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
        votes = np.bincount(_nearest_colors(pixels[core], level), minlength=len(COLORS))
        shares = dict(zip(COLORS, (votes / votes.sum()).tolist(), strict=True))
        thing = Thing(shape=shape, color=max(shares, key=shares.__getitem__), x=x, y=y, radius=radius)
        found.append(Found(thing=thing, overlap=overlap, shares=shares, mask=mask))
    return sorted(found, key=lambda f: -int(f.mask.sum()))


# ---------------------------------------------------------------------------------------------------- judging


def fits(found: Found, wanted: Wanted) -> bool:
    """Whether an object is what a caption asks for."""
    thing = found.thing
    return (
        found.valid
        and thing.shape == wanted.shape
        and wanted.size in (None, thing.size)
        and _painted(found.shares, wanted.color or thing.color, wanted.accent)
    )


def _painted(shares: dict[str, float], color: str, accent: str | None) -> bool:
    """Whether an object is of one colour, or of two that both show."""
    colors = [color] if accent is None else [color, accent]
    return sum(shares[c] for c in colors) >= PURE and min(shares[c] for c in colors) >= TOUCH


def holds(relation: str | None, first: Thing, second: Thing) -> bool:
    """Whether the first stands so to the second, and in no other direction more than in that one."""
    if relation is None:
        return True
    x, y = second.x - first.x, second.y - first.y
    along, across = (x, y) if relation in ("left of", "right of") else (y, x)
    return (along if relation in ("left of", "above") else -along) > abs(across)


def assignments(found: list[Found], wanted: tuple[Wanted, ...]) -> list[list[Found]]:
    """Every way to give each wanted object a found one of its own."""
    if not wanted:
        return [[]]
    return [
        [item, *rest]
        for i, item in enumerate(found)
        if fits(item, wanted[0])
        for rest in assignments(found[:i] + found[i + 1 :], wanted[1:])
    ]


def matches(image: np.ndarray, caption: str | Request) -> bool:
    """Whether an image ``uint8 [64, 64, 3]`` shows just what its caption asks: objects, count, colours, relation.

    What they stand on is another question: :func:`ground_of`.
    """
    request = read_caption(caption) if isinstance(caption, str) else caption
    found = read(image)
    if len(found) != len(request.things):
        return False
    ways = assignments(found, request.things)
    return any(len(w) < 2 or holds(request.relation, w[0].thing, w[1].thing) for w in ways)


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
    """Name of the subject in an image, or ``None`` when something else explains the picture better."""
    names = [name for name in (recognise_object(image, found) for found in read(image)) if name]
    return names[0] if names else None


def recognise_object(image: np.ndarray, found: Found) -> str | None:
    """Name of the subject that one object is, or ``None``."""
    scores = {name: likeness(image, found, subject) for name, subject in SUBJECTS.items()}
    name = max(scores, key=scores.__getitem__)
    best = scores[name]
    others = (likeness(image, found, other) for other in _others(SUBJECTS[name]))
    return name if best > 0 and all(best > other for other in others) else None


def _others(subject: Subject) -> Iterator[Subject]:
    """What a subject might be taken for: one of its looks changed, all other looks the same."""
    yield from (replace(subject, shape=shape) for shape in SHAPES if shape != subject.shape)
    yield from (replace(subject, pattern=pattern) for pattern in PATTERNS if pattern != subject.pattern)
    yield replace(subject, color=subject.accent, accent=subject.color)
    for color in COLORS:
        if color != subject.color:
            yield replace(subject, color=color)
        if color != subject.accent:
            yield replace(subject, accent=color)


def composed(image: np.ndarray, name: str, relation: str, other: Wanted) -> bool:
    """Whether an image shows a subject, in a relation to one other object, and nothing else."""
    found = read(image)
    if len(found) != 2:
        return False
    return any(
        recognise_object(image, one) == name and fits(two, other) and holds(relation, one.thing, two.thing)
        for one, two in (found, found[::-1])
    )


def ground_of(image: np.ndarray) -> tuple[str, str]:
    """Tone and texture of the ground: those whose drawing is nearest to the image outside of its objects."""
    pixels = np.asarray(image, np.float32)
    # An object's soft edge belongs to neither.
    outside = ~ndimage.binary_dilation(_chroma(pixels) > CHROMA_THRESHOLD, iterations=2)
    kinds = itertools.product(TONES, TEXTURES)
    return min(kinds, key=lambda kind: float(np.abs(pixels - ground(*kind))[outside].mean()) if outside.any() else 0.0)
