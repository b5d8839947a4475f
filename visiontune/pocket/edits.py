"""Edits of the pocket world: a scene, an instruction, the scene that it asks for, and a judge that knows the truth.

Whatever an instruction does not speak of stays where it is, pixel by pixel. Where a thing is put that is added or moved
is left open but for its relation to another one, as the instruction leaves it open; all else has one right answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from visiontune.pocket.oracle import Found, Wanted, ground_of, read
from visiontune.pocket.oracle import fits as looks
from visiontune.pocket.oracle import holds as stands
from visiontune.pocket.scenes import article, held_out, sample_scene
from visiontune.pocket.world import COLORS, RELATIONS, SIZE, Scene, Thing

Kind = Literal["recolour", "move", "add", "remove", "swap"]
KINDS: tuple[Kind, ...] = ("recolour", "move", "add", "remove", "swap")
# Pixels by which a thing may be off its place, along either side.
SLACK = 4.0
# Pixels between two things, and between a thing and the border.
_GAP, _BORDER = 3.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One edit.

    Attributes:
        before, after: the scenes. A thing that is in both is what the edit leaves alone.
        anchor: what stands in a relation to the thing that was added or moved, if anything. relation: of that to it.
    """

    kind: Kind
    instruction: str
    before: Scene
    after: Scene
    anchor: Thing | None = None
    relation: str | None = None

    @property
    def kept(self) -> tuple[Thing, ...]:
        """The things that are left alone."""
        return tuple(thing for thing in self.before.things if thing in self.after.things)

    @property
    def changed(self) -> tuple[Thing, ...]:
        """The things that the edit made, as they are after it."""
        return tuple(thing for thing in self.after.things if thing not in self.before.things)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an edited picture is.

    Attributes:
        changed: it shows what was asked for, and besides what was left alone nothing else.
        kept: all that was left alone is where it was and as it was, the ground too, and nothing came up that neither
            scene has.
    """

    changed: bool
    kept: bool


# ---------------------------------------------------------------------------------------------------- judging


def judge(picture: np.ndarray, edit: Edit) -> Verdict:
    """Read an edited picture ``uint8 [64, 64, 3]`` by the oracle, and compare it with the truth."""
    found = read(picture)
    kept, others = _taken(found, edit.kept)
    moved = [thing for thing in (*edit.before.things, *edit.after.things) if thing not in edit.kept]
    strange = [one for one in others if not any(_near(one, thing) for thing in moved) and not _made(one, edit)]
    ground = ground_of(picture) == (edit.before.tone, edit.before.texture)
    return Verdict(
        changed=len(others) == len(edit.changed) and all(_shown(others, thing, edit) for thing in edit.changed),
        kept=kept and ground and not strange,
    )


def _taken(found: Sequence[Found], things: Sequence[Thing]) -> tuple[bool, list[Found]]:
    """Whether all things are where they are to be, and what was found besides them."""
    left, whole = list(found), True
    for thing in things:
        here = next((one for one in left if _alike(one, thing) and _near(one, thing)), None)
        if here is None:
            whole = False
            # What stands in its place is a bad copy of it, and nothing that came up.
            here = next((one for one in left if _near(one, thing)), None)
        if here is not None:
            left = [one for one in left if one is not here]
    return whole, left


def _shown(found: Sequence[Found], thing: Thing, edit: Edit) -> bool:
    if edit.anchor is not None:
        return any(_made(one, edit) for one in found)
    return any(_alike(one, thing) and _near(one, thing) for one in found)


def _made(found: Found, edit: Edit) -> bool:
    """Whether something is what was added or moved: its looks and its relation are told, and its place is not."""
    if edit.anchor is None:
        return False
    return _alike(found, edit.changed[0]) and stands(edit.relation, found.thing, edit.anchor)


def _alike(found: Found, thing: Thing) -> bool:
    return looks(found, Wanted(shape=thing.shape, color=thing.color, size=thing.size))


def _near(found: Found, thing: Thing) -> bool:
    return max(abs(found.thing.x - thing.x), abs(found.thing.y - thing.y)) <= SLACK


# ---------------------------------------------------------------------------------------------------- drawing


def stream(seed: int, kinds: Sequence[Kind] = KINDS, holdout: bool = False) -> Iterator[Edit]:
    """Endless edits, the kinds in turn: those that are trained on, or the one in ten whose instruction never is."""
    rng = np.random.default_rng(seed)
    while True:
        for kind in kinds:
            while (edit := _MAKERS[kind](rng)) is None or held_out(edit.instruction) != holdout:
                pass
            yield edit


def _scene(rng: np.random.Generator, *kinds: str) -> Scene | None:
    """A scene whose things have names of their own, in which relations play no part."""
    scene = sample_scene(rng, str(rng.choice(kinds)))
    names = {_name(thing) for thing in scene.things}
    return replace(scene, relation=None) if len(names) == len(scene.things) else None


def _name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _recolour(rng: np.random.Generator) -> Edit | None:
    scene = _scene(rng, "one", "two", "three")
    if scene is None:
        return None
    thing = scene.things[rng.integers(len(scene.things))]
    color = str(rng.choice([color for color in COLORS if color != thing.color]))
    after = _with(scene, thing, replace(thing, color=color))
    return Edit(kind="recolour", instruction=f"make the {_name(thing)} {color}", before=scene, after=after)


def _remove(rng: np.random.Generator) -> Edit | None:
    scene = _scene(rng, "two", "three")
    if scene is None:
        return None
    thing = scene.things[rng.integers(len(scene.things))]
    return Edit(kind="remove", instruction=f"remove the {_name(thing)}", before=scene, after=_with(scene, thing))


def _add(rng: np.random.Generator) -> Edit | None:
    scene = _scene(rng, "one", "two")
    if scene is None:
        return None
    anchor, new = scene.things[rng.integers(len(scene.things))], sample_scene(rng, "one").things[0]
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    new = _beside(new, anchor, relation, rng)
    if not _has_room(new, scene.things) or _name(new) in map(_name, scene.things):
        return None
    return Edit(
        kind="add",
        instruction=f"add {article(f'{new.size} {_name(new)}')} {relation} the {_name(anchor)}",
        before=scene,
        after=replace(scene, things=(*scene.things, new)),
        anchor=anchor,
        relation=relation,
    )


def _move(rng: np.random.Generator) -> Edit | None:
    scene = _scene(rng, "two")
    if scene is None:
        return None
    thing, anchor = (scene.things[i] for i in rng.permutation(2))
    relation = str(rng.choice([one for one in RELATIONS if not stands(one, thing, anchor)]))
    moved = _beside(thing, anchor, relation, rng)
    if not _has_room(moved, [anchor]):
        return None
    return Edit(
        kind="move",
        instruction=f"move the {_name(thing)} {relation} the {_name(anchor)}",
        before=scene,
        after=_with(scene, thing, moved),
        anchor=anchor,
        relation=relation,
    )


def _swap(rng: np.random.Generator) -> Edit | None:
    scene = _scene(rng, "two", "three")
    if scene is None:
        return None
    one, other = (scene.things[i] for i in rng.permutation(len(scene.things))[:2])
    there, here = replace(one, x=other.x, y=other.y), replace(other, x=one.x, y=one.y)
    rest = [thing for thing in scene.things if thing not in (one, other)]
    if not (_has_room(there, [*rest, here]) and _has_room(here, rest)):
        return None
    after = _with(_with(scene, one, there), other, here)
    return Edit(kind="swap", instruction=f"swap the {_name(one)} and the {_name(other)}", before=scene, after=after)


def _with(scene: Scene, thing: Thing, *instead: Thing) -> Scene:
    """The scene with other things in the place of one."""
    things = (new for one in scene.things for new in (instead if one is thing else (one,)))
    return replace(scene, things=tuple(things))


def _beside(thing: Thing, anchor: Thing, relation: str, rng: np.random.Generator) -> Thing:
    """A thing put in a relation to another, a few pixels from it; it may lie beyond the border."""
    along = anchor.radius + thing.radius + rng.uniform(4, 8)
    across = rng.uniform(-5, 5)
    sign = -1 if relation in ("left of", "above") else 1
    x, y = (sign * along, across) if relation in ("left of", "right of") else (across, sign * along)
    return replace(thing, x=anchor.x + x, y=anchor.y + y)


def _has_room(thing: Thing, others: Sequence[Thing]) -> bool:
    """Whether a thing lies on the canvas, and apart from all others."""
    low, high = thing.radius + _BORDER, SIZE - thing.radius - _BORDER
    inside = low <= thing.x <= high and low <= thing.y <= high
    return inside and all(
        np.hypot(thing.x - one.x, thing.y - one.y) >= thing.radius + one.radius + _GAP for one in others
    )


_MAKERS = {"recolour": _recolour, "move": _move, "add": _add, "remove": _remove, "swap": _swap}
