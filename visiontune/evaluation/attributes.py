"""What a CLIP can tell apart in the pocket world, one attribute at a time.

Each row of the audit is a forced choice: one picture, and captions that differ from its own in one attribute. Beside
the share of right choices stands what judges that lack a sense would score, since chance does not say it all:

- ``chance``: knows nothing;
- ``colours``: knows which colours there are, and no more;
- ``words``: knows which words are true, but not how they belong together;
- ``shapeless``: knows everything but shapes.

A judge that lacks a sense guesses among the captions that it cannot tell from the true one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visiontune.evaluation.metrics import image_features
from visiontune.models.clip import ClipEncoder
from visiontune.pocket.scenes import NUMBERS, caption, held_out, patterned, sample_scene, subject_scene
from visiontune.pocket.world import COLORS, RADII, RELATIONS, SHAPES, SUBJECTS, TEXTURES, TONES, Scene, render

_MIRRORED = {"right of": "left of", "below": "above"}
POOL = 100


# ---------------------------------------------------------------------------------------------------- meaning


def meaning(scene: Scene, sizes: bool = True, ground: bool = True, shapes: bool = True) -> tuple:
    """What a caption of the scene says, however it is said: equal for "a left of b" and "b right of a".

    Args:
        scene: the scene described.
        sizes: whether the caption names sizes (it never does where several objects are alike).
        ground: whether it names the ground.
        shapes: whether shapes count; what is left is all that a judge blind to them can know.
    """
    sizes = sizes and not alike(scene)
    things = [(t.color, t.accent, t.shape if shapes else "", t.size if sizes else "") for t in scene.things]
    relation = scene.relation or ""
    if relation in _MIRRORED:
        things, relation = things[::-1], _MIRRORED[relation]
    if not relation:
        things.sort()
    return tuple(things), relation, (scene.tone, scene.texture) if ground else ()


def _colours(scene: Scene) -> tuple:
    return tuple(sorted({c for t in scene.things for c in (t.color, t.accent) if c}))


def _words(scene: Scene) -> tuple:
    return tuple(sorted(caption(scene, np.random.default_rng(0), detail=1.0).split()))


def _shapeless(scene: Scene) -> tuple:
    return meaning(scene, shapes=False)


JUDGES: dict[str, Callable[[Scene], tuple]] = {
    "chance": lambda scene: (),
    "colours": _colours,
    "words": _words,
    "shapeless": _shapeless,
}


# ---------------------------------------------------------------------------------------------------- questions


def alike(scene: Scene) -> bool:
    """Whether the scene is several objects that look the same, described by their number."""
    return not scene.relation and len(scene.things) > 1 and len({(t.shape, t.color) for t in scene.things}) == 1


def with_thing(scene: Scene, index: int, **changes: Any) -> Scene:
    """The scene with some fields of one object changed, or of all where they are alike."""
    changed = [replace(t, **changes) if i == index or alike(scene) else t for i, t in enumerate(scene.things)]
    return replace(scene, things=tuple(changed))


def recoloured(scene: Scene, first: int, second: int) -> Scene:
    """The scene with the colours of two objects exchanged."""
    one, other = scene.things[first], scene.things[second]
    swapped = with_thing(scene, first, color=other.color, accent=other.accent)
    return with_thing(swapped, second, color=one.color, accent=one.accent)


def _shapes(scene: Scene, index: int) -> list[Scene]:
    return [with_thing(scene, index, shape=shape) for shape in SHAPES]


def _colors(scene: Scene, index: int) -> list[Scene]:
    accent = scene.things[index].accent
    return [with_thing(scene, index, color=color) for color in COLORS if color != accent]


def _sizes(scene: Scene, index: int) -> list[Scene]:
    return [with_thing(scene, index, radius=radius) for radius in RADII.values()]


def _counts(scene: Scene) -> list[Scene]:
    return [replace(scene, things=scene.things[:1] * n) for n in (1, *NUMBERS)]


def _tones(scene: Scene) -> list[Scene]:
    return [replace(scene, tone=tone) for tone in TONES]


def _textures(scene: Scene) -> list[Scene]:
    return [replace(scene, texture=texture) for texture in TEXTURES]


def _relations(scene: Scene) -> list[Scene]:
    return [replace(scene, relation=relation) for relation in RELATIONS]


def _places(scene: Scene) -> list[Scene]:
    """Colours exchanged or not, on either side: two of the four have every colour, and two every shape, in place."""
    opposite = {"left of": "right of", "above": "below"}
    opposite |= {b: a for a, b in opposite.items()}
    turned = replace(scene, relation=opposite[str(scene.relation)])
    return [scene, recoloured(scene, 0, 1), turned, recoloured(turned, 0, 1)]


def neighbours(scene: Scene) -> list[Scene]:
    """Every scene whose full caption differs from the scene's own in one word."""
    edits = _tones(scene) + _textures(scene) + (_relations(scene) if scene.relation else [])
    edits += [replace(scene, things=scene.things[:1] * n) for n in NUMBERS] if alike(scene) else []
    for i in range(len(scene.things)):
        edits += _shapes(scene, i) + _colors(scene, i) + _sizes(scene, i)
    return _others(scene, edits)


def _others(scene: Scene, edits: Iterable[Scene]) -> list[Scene]:
    """Edits that mean something else than the scene and than one another."""
    seen = {meaning(scene): scene}
    for edit in edits:
        seen.setdefault(meaning(edit), edit)
    return list(seen.values())[1:]


def _differ(scene: Scene, *fields: str) -> bool:
    """Whether no two objects agree in any of the fields."""
    return all(len({getattr(t, f) for t in scene.things}) == len(scene.things) for f in fields)


def _straight(scene: Scene) -> bool:
    """Whether two objects are so level, within the oracle's margin of 4 pixels, that one relation alone is true."""
    one, other = scene.things[:2]
    return min(abs(one.x - other.x), abs(one.y - other.y)) < 3


def _one_color(scene: Scene) -> Scene:
    return with_thing(scene, 1, color=scene.things[0].color)


def _some_alike(rng: np.random.Generator) -> Scene:
    """One, two or three small objects that look the same, each number as often."""
    scene = sample_scene(rng, "many")
    n = int(rng.integers(1, 4))
    while n > 1 and len(scene.things) != n:
        scene = sample_scene(rng, "many")
    return replace(scene, things=scene.things[:n])


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row of the audit: scenes it asks about, the scenes each is told from, and how much its captions say.

    Attributes:
        kind: ``recognition`` of what there is, or ``composition``, of how it belongs together.
    """

    name: str
    draw: Callable[[np.random.Generator], Scene]
    edits: Callable[[Scene], list[Scene]]
    suits: Callable[[Scene], bool] = lambda scene: True
    detail: float = 0.5
    kind: str = "recognition"


def _of(kind: str) -> Callable[[np.random.Generator], Scene]:
    return lambda rng: sample_scene(rng, kind)


QUESTIONS = (
    Question(name="shape", draw=_of("one"), edits=lambda s: _shapes(s, 0)),
    Question(name="shape, shortest captions", draw=_of("one"), edits=lambda s: _shapes(s, 0), detail=0.0),
    Question(
        name="shape, two-coloured",
        draw=lambda rng: patterned(sample_scene(rng, "one"), rng, 1.0),
        edits=lambda s: _shapes(s, 0),
        suits=lambda s: bool(s.things[0].accent),
    ),
    Question(name="shape of one of two", draw=_of("two"), edits=lambda s: _shapes(s, 0)),
    Question(name="shape of one of three", draw=_of("three"), edits=lambda s: _shapes(s, 0)),
    Question(name="colour", draw=_of("one"), edits=lambda s: _colors(s, 0)),
    Question(name="size", draw=_of("one"), edits=lambda s: _sizes(s, 0), detail=1.0),
    Question(name="size of one of two", draw=_of("two"), edits=lambda s: _sizes(s, 0), detail=1.0),
    Question(name="tone of the ground", draw=sample_scene, edits=_tones, detail=1.0),
    Question(name="texture of the ground", draw=sample_scene, edits=_textures, detail=1.0),
    Question(name="count", draw=_some_alike, edits=_counts),
    Question(
        name="relation",
        kind="composition",
        draw=_of("two"),
        edits=_relations,
        suits=lambda s: _straight(s) and _differ(s, "color"),
    ),
    Question(
        name="relation, one colour",
        kind="composition",
        draw=lambda rng: _one_color(sample_scene(rng, "two")),
        edits=_relations,
        suits=lambda s: _straight(s) and _differ(s, "shape"),
    ),
    Question(
        name="colours of two swapped",
        kind="composition",
        draw=_of("two"),
        edits=lambda s: [s, recoloured(s, 0, 1)],
        suits=lambda s: _differ(s, "color", "shape"),
    ),
    Question(
        name="colours of two swapped, or their sides, or both",
        kind="composition",
        draw=_of("two"),
        edits=_places,
        suits=lambda s: _differ(s, "color", "shape"),
    ),
    Question(
        name="colours of two of three swapped",
        kind="composition",
        draw=_of("three"),
        edits=lambda s: [s, recoloured(s, 0, 1)],
        suits=lambda s: _differ(s, "color", "shape"),
    ),
    Question(
        name="every caption that differs in one word",
        kind="composition",
        draw=sample_scene,
        edits=neighbours,
        suits=lambda s: not s.relation or (_straight(s) and (_differ(s, "color") or _differ(s, "shape"))),
        detail=1.0,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One picture with its captions, the true one first."""

    scenes: list[Scene]
    captions: list[str]


def ask(question: Question, rng: np.random.Generator) -> Asked:
    """Draw a question; its true caption is one that was never trained on."""
    while True:
        scene, style = question.draw(rng), int(rng.integers(2**31))
        # One seed for all captions, so that they open alike and say as much.
        texts = {meaning(scene): (scene, caption(scene, np.random.default_rng(style), question.detail))}
        if not question.suits(scene) or not held_out(texts[meaning(scene)][1]):
            continue
        for other in _others(scene, question.edits(scene)):
            texts[meaning(other)] = (other, caption(other, np.random.default_rng(style), question.detail))
        scenes, captions = zip(*texts.values(), strict=True)
        return Asked(scenes=list(scenes), captions=list(captions))


def any_pool(rng: np.random.Generator, size: int = POOL) -> Asked:
    """Scenes of all kinds with captions that were never trained on, of full detail."""
    return _pool(rng, size, sample_scene)


def hard_pool(rng: np.random.Generator, size: int = POOL) -> Asked:
    """The same, all in one colour on one ground: captions differ in shapes, sizes, number and relation alone."""
    color, tone, texture = (str(rng.choice(list(words))) for words in (COLORS, TONES, TEXTURES))

    def draw(rng: np.random.Generator) -> Scene:
        scene = sample_scene(rng, str(rng.choice(["one", "two", "many"])))
        things = tuple(replace(t, color=color) for t in scene.things)
        return replace(scene, things=things, tone=tone, texture=texture)

    return _pool(rng, size, draw)


def _pool(rng: np.random.Generator, size: int, draw: Callable[[np.random.Generator], Scene]) -> Asked:
    found: dict[tuple, tuple[Scene, str]] = {}
    while len(found) < size:
        scene = draw(rng)
        text = caption(scene, rng, detail=1.0)
        twins = bool(scene.relation) and not _differ(scene, "shape") and not _differ(scene, "color")
        # "two red stars" would be true of a red star left of a red star.
        if held_out(text) and not twins:
            found.setdefault(meaning(scene), (scene, text))
    scenes, captions = zip(*found.values(), strict=True)
    return Asked(scenes=list(scenes), captions=list(captions))


POOLS = {"any captions": any_pool, "one colour and ground": hard_pool}


# ---------------------------------------------------------------------------------------------------- answers


def _guess(scenes: list[Scene], own: int, judge: Callable[[Scene], tuple]) -> float:
    """Expected score of a judge that guesses among the scenes it cannot tell from its ``own``."""
    known = judge(scenes[own])
    return 1 / sum(judge(scene) == known for scene in scenes)


def _hit(scores: Tensor, own: int) -> float:
    """1 where the own answer has the highest of ``scores [k]``; ties are guesses, or a constant would be right."""
    best = scores == scores.max()
    return float(best[own] / best.sum())


def _row(name: str, kind: str, hits: list[float], guesses: dict[str, list[float]]) -> dict:
    baselines = {key: float(np.mean(values)) for key, values in guesses.items()}
    return {"what": name, "kind": kind, "value": float(np.mean(hits)), "n": len(hits), **baselines}


def _drawn(scenes: Iterable[Scene], style: str | None) -> np.ndarray:
    """Pictures of scenes, in their own style or another."""
    return np.stack([render(replace(scene, style=style) if style else scene) for scene in scenes])


def choices(
    encoder: ClipEncoder, questions: list[Asked], name: str, kind: str = "recognition", style: str | None = None
) -> dict:
    """Share of pictures whose own caption is the nearest of those asked, as a row with its baselines."""
    pictures = image_features(_drawn([q.scenes[0] for q in questions], style), encoder)
    texts = encoder.text_features([text for q in questions for text in q.captions])
    parts = texts.split([len(q.captions) for q in questions])
    hits = [_hit(part @ picture, 0) for picture, part in zip(pictures, parts, strict=True)]
    guesses = {key: [_guess(q.scenes, 0, judge) for q in questions] for key, judge in JUDGES.items()}
    return _row(name, kind, hits, guesses)


def pools(encoder: ClipEncoder, questions: list[Asked], name: str, style: str | None = None) -> dict:
    """Image-to-text top-1 within pools in which every picture has a caption of its own, as a row with its baselines."""
    hits: list[float] = []
    guesses: dict[str, list[float]] = {key: [] for key in JUDGES}
    for q in questions:
        pictures = image_features(_drawn(q.scenes, style), encoder)
        scores = pictures @ encoder.text_features(q.captions).T
        hits += [_hit(row, i) for i, row in enumerate(scores)]
        for key, judge in JUDGES.items():
            guesses[key] += [_guess(q.scenes, i, judge) for i in range(len(q.scenes))]
    return _row(name, "retrieval", hits, guesses)


def likeness(encoder: ClipEncoder, n: int, rng: np.random.Generator, name: str, style: str | None = None) -> dict:
    """Share of pictures of a subject that are nearer to another picture of it than to its paint on another shape."""
    pictures = []
    for subject in itertools.islice(itertools.cycle(SUBJECTS.values()), n):
        other = replace(subject, shape=str(rng.choice([shape for shape in SHAPES if shape != subject.shape])))
        here, there = (int(seed) for seed in rng.integers(2**31, size=2))
        # The decoy stands where the true picture does, so that nothing but its shape gives it away.
        trio = ((subject, here), (subject, there), (other, there))
        pictures += [subject_scene(s, np.random.default_rng(seed)) for s, seed in trio]
    anchor, true, decoy = image_features(_drawn(pictures, style), encoder).view(n, 3, -1).unbind(1)
    scores = torch.stack([(anchor * true).sum(-1), (anchor * decoy).sum(-1)], 1)
    return _row(name, "likeness", [_hit(row, 0) for row in scores], {key: [0.5] for key in JUDGES})


def audit(encoder: ClipEncoder, n: int = 300, seed: int = 906, style: str | None = None) -> Iterator[dict]:
    """Rows ``{what, kind, value, n, chance, colours, words, shapeless}``, one for each attribute.

    Args:
        encoder: the CLIP under judgement.
        n: pictures a row; those of retrieval have as many pools of 100 as fit, but at least one.
        seed: of the questions; true captions are held out whatever it is.
        style: what all pictures are drawn in; their own unless given.
    """
    for i, question in enumerate(QUESTIONS):
        rng = np.random.default_rng([seed, i])
        yield choices(encoder, [ask(question, rng) for _ in range(n)], question.name, question.kind, style)
    rng = np.random.default_rng([seed, len(QUESTIONS)])
    for name, draw in POOLS.items():
        yield pools(encoder, [draw(rng) for _ in range(max(n // POOL, 1))], f"top-1 of {POOL}, {name}", style)
    yield likeness(encoder, n, rng, "a subject's picture, not its paint on another shape", style)
