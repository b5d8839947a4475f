"""Catalogue datasets that are drawn rather than downloaded, from the pocket world."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Literal

import numpy as np
from PIL import Image

from visiontune.data import segments
from visiontune.data.base import DEFAULT_PROMPT, DEFAULT_TRIGGER, SEGMENTS, Sample, Source, source, substitute
from visiontune.data.scores import Ranges, shares
from visiontune.errors import UserError
from visiontune.pocket.controls import MAPS
from visiontune.pocket.edits import KINDS, Kind
from visiontune.pocket.edits import stream as stream_edits
from visiontune.pocket.scenes import article, caption, individual, phrases, sample_scene, stream, subject_scene
from visiontune.pocket.spoilt import Flaws, flaws
from visiontune.pocket.world import STYLES, SUBJECTS, Scene, Thing, coverage, render
from visiontune.schema import nearest, option


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A ``datasets/*.yaml`` file with ``source: procedural``."""

    source: Literal["procedural"] = option("procedural", help="how the images come about")
    world: Literal["subject", "sets", "style", "scenes", "edits"] = option(
        help="subject: one individual; sets: many individuals, several pictures of each; style: any scene in one "
        "style; scenes: the training world; edits: scenes with instructions, and what they make of others (column "
        "source)"
    )
    members: int = option(4, least=1, greatest=1000, help="pictures of each individual (world: sets)")
    subject: str | None = option(None, help="name of the subject (world: subject)")
    style: str = option("flat", help="rendering style: flat, outline, pixel, shaded or hatched")
    rejected_style: str | None = option(None, help="draw every scene in this style too, as the worse image of a pair")
    map: Literal["sketch", "colors"] | None = option(
        None, help="of every scene this map, for controls, in the place of the picture"
    )
    holdout: bool = option(
        False, help="only scenes and edits whose captions pocket models have never seen (world: scenes, edits)"
    )
    spoilt: float = option(
        0.0,
        least=0,
        greatest=1,
        help="share of pictures in [0, 1] in a wrong colour, rated by faithful (0 or 1), and share of those under "
        "noise, rated by clean (0 to 5) (world: scenes, edits)",
    )
    edits: list[Kind] = option(list(KINDS), help="kinds of edits, in turn (world: edits)")
    kinds: list[Literal["one", "two", "many", "three"]] = option(
        [], help="scenes of so many objects, taking turns; empty: as in the training world (world: scenes, style)"
    )
    count: int = option(5, least=1, greatest=10_000_000, help="number of images")
    seed: int = option(0, least=0, greatest=2**63 - 1, help="seed of the scenes")
    caption: str | None = option(None, help="caption of every image; {scene} stands for the scene's own description")
    class_noun: str | None = option(None, help="what [class] stands for")
    trigger: str = option(DEFAULT_TRIGGER, help="what [trigger] stands for")
    licence: str = option("CC0-1.0", help="licence of the images")
    description: str = option("", help="one line for the catalogue's table")

    def __post_init__(self) -> None:
        if self.world == "subject" and self.subject not in SUBJECTS:
            raise UserError(f"unknown subject '{self.subject}'{nearest(str(self.subject), SUBJECTS)}")
        for style in (self.style, self.rejected_style or self.style):
            if style not in STYLES:
                raise UserError(f"unknown style '{style}'{nearest(style, STYLES)}")
        if not self.edits:
            raise UserError(f"edits names no kind: give some of {', '.join(KINDS)}")
        if self.spoilt and (self.world not in ("scenes", "edits") or self.map or self.rejected_style):
            raise UserError("spoilt is of plain pictures of the worlds scenes and edits: leave it out")
        if self.map and self.rejected_style:
            raise UserError("a map has no worse image: leave rejected_style out")
        if self.world == "subject" and not self.caption:
            raise UserError("a subject needs a caption: 'a photo of a [trigger] [class]'")


def samples(
    spec: Spec,
    name: str,
    *,
    columns: Sequence[str] = ("image",),
    optional: Sequence[str] = (),
    prompt: str | None = None,
    trigger: str,
    class_noun: str | None,
    ranges: Ranges | None = None,
) -> list[Sample]:
    """Draw a dataset; the same spec gives the same pixels on every machine.

    Args:
        spec: what to draw.
        name: the catalogue name, which ids start with.
        columns: what each sample is to have. optional: what it has if that is drawn.
        prompt: replaces the spec's caption.
        trigger: what ``[trigger]`` stands for.
        class_noun: what ``[class]`` stands for.
        ranges: of the ratings that are wanted.

    Raises:
        UserError: a column that is not drawn.
    """
    drawn = ["image"] + ["rejected"] * bool(spec.rejected_style) + ["source"] * (spec.world == "edits")
    drawn += [SEGMENTS] if spec.world == "scenes" and not (spec.map or spec.spoilt) else []
    # Of no use to most models, so that it is drawn for those who need it.
    drawn += ["region"] if spec.world == "subject" and "region" in columns else []
    lacking = [column for column in columns if column not in drawn]
    if lacking:
        has = {"rejected": "pocket/pairs", "source": "pocket/edits", "region": "pocket/bumble"}.get(lacking[0])
        hint = f"; {has} has" if has else ""
        raise UserError(f"dataset {name} has no '{lacking[0]}' pictures{hint}: take another, or your own")
    wanted = [*columns, *(column for column in optional if column in drawn)]
    template = prompt or spec.caption or "{scene}"
    rows = list(islice(_rows(spec), spec.count))
    wrong = [flaws(spec.spoilt, _seed(spec, i)) for i in range(len(rows))]
    return [
        Sample(
            id=f"{name}/{i:04d}",
            sources={column: _source(spec, column, scene, before, wrong[i]) for column in wanted},
            scores=shares(wrong[i].ratings() if spec.spoilt else {}, ranges or {}, f"{name}/{i:04d}"),
            nouns=tuple(phrases(scene)) if SEGMENTS in wanted else (),
            caption=substitute(template.replace("{scene}", words), trigger, class_noun),
            caption_from=DEFAULT_PROMPT if prompt else f"the dataset {name}",
            set=f"{i // spec.members:04d}" if spec.world == "sets" else "",
        )
        for i, (scene, words, before) in enumerate(rows)
    ]


def _seed(spec: Spec, i: int) -> int:
    """Of what spoils a picture."""
    return int(np.random.SeedSequence([spec.seed, i]).generate_state(1)[0])


def _source(spec: Spec, column: str, scene: Scene, before: Scene, wrong: Flaws) -> Source:
    if column == "image" and spec.spoilt:
        return source(column, partial(_spoilt, scene, wrong))
    if column == SEGMENTS:
        return Source(partial(_places, scene), "segments")
    if column == "region":
        return source(column, partial(_where, scene.things[0]))
    return source(column, _picture(spec, column, scene, before))


def _spoilt(scene: Scene, wrong: Flaws) -> Image.Image:
    return Image.fromarray(wrong.draw(scene))


def _places(scene: Scene) -> Image.Image:
    """Where the objects are, by the words that the caption has for them."""
    masks = [np.max([_coverage(scene.things[i]) for i in places], axis=0) for places in phrases(scene).values()]
    return segments.packed([Image.fromarray((255 * mask).astype(np.uint8)) for mask in masks])


def _where(thing: Thing) -> Image.Image:
    return Image.fromarray((255 * (_coverage(thing) > 0)).astype(np.uint8))


def _coverage(thing: Thing) -> np.ndarray:
    return coverage(thing.shape, thing.x, thing.y, thing.radius)


def _picture(spec: Spec, column: str, scene: Scene, before: Scene) -> Callable[[], Image.Image]:
    """What draws a column of a row."""
    style = spec.rejected_style if column == "rejected" else None
    return partial(_draw, before if column == "source" else scene, style, spec.map)


def _rows(spec: Spec) -> Iterator[tuple[Scene, str, Scene]]:
    """Endless scenes of a spec, their captions or instructions, and what was edited, or the scene itself."""
    if spec.world == "edits":
        yield from (
            (edit.after, edit.instruction, edit.before) for edit in stream_edits(spec.seed, spec.edits, spec.holdout)
        )
    yield from ((scene, words, scene) for scene, words in _scenes(spec))


def _draw(scene: Scene, style: str | None, of_picture: str | None) -> Image.Image:
    """A scene, in its own style or another, or a map of it."""
    picture = render(replace(scene, style=style) if style else scene)
    return Image.fromarray(MAPS[of_picture](picture) if of_picture else picture)


def _scenes(spec: Spec) -> Iterator[tuple[Scene, str]]:
    """Endless scenes of a spec with their own descriptions."""
    rng = np.random.default_rng(spec.seed)
    if spec.world == "scenes":
        streams = [stream(spec.seed + i, kind, spec.holdout) for i, kind in enumerate(spec.kinds or [None])]
        while True:
            yield from map(next, streams)
    kinds = cycle(spec.kinds or [None])
    while True:
        if spec.world == "sets":
            one = individual(rng)
            for scene in (subject_scene(one, rng, spec.style) for _ in range(spec.members)):
                yield scene, f"{article(one.shape)} on a {scene.tone} {scene.texture} background"
        elif spec.world == "subject":
            scene = subject_scene(SUBJECTS[str(spec.subject)], rng, spec.style)
            yield scene, scene.things[0].shape
        else:
            scene = sample_scene(rng, next(kinds))
            words = caption(scene, rng)
            yield Scene(**{**vars(scene), "style": spec.style}), words
