"""Holes in pocket scenes: what lies in them, what is asked for, and the judge."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from visiontune.pocket.holes import filled, mask_of, standing, stream
from visiontune.pocket.oracle import read_caption
from visiontune.pocket.scenes import held_out
from visiontune.pocket.world import COLORS, SHAPES, coverage, render


@pytest.fixture(scope="module")
def holes():
    return list(islice(stream(5, ["thing"], patterns=0.0), 60))


def test_the_thing_lies_in_the_box_and_is_asked_for(holes):
    for hole in holes:
        left, top, width, height = hole.box
        where = coverage(hole.thing.shape, hole.thing.x, hole.thing.y, hole.thing.radius) > 0
        assert not where[~mask_of(hole.box)].any() and mask_of(hole.box).sum() == width * height
        # Each side leaves a pixel or a few, if the picture goes on there.
        spans = [(left, width, where.any(0)), (top, height, where.any(1))]
        for first, length, there in spans:
            at = np.flatnonzero(there)
            before, after = at[0] - first, first + length - 1 - at[-1]
            assert (1 <= before <= 6 or first == 0) and (1 <= after <= 6 or first + length == 64)
        asked = read_caption(hole.prompt).things
        assert (hole.thing.shape, hole.thing.color) in {(one.shape, one.color) for one in asked}
        assert not held_out(hole.prompt)
    alone = np.mean([len(read_caption(hole.prompt).things) == 1 < len(hole.scene.things) for hole in holes])
    assert 0.1 < alone < 0.6


def test_the_scene_fills_its_hole_and_no_other_does(holes):
    assert np.mean([filled(render(hole.scene), hole) for hole in holes]) > 0.95
    for hole in holes:
        thing = hole.thing
        color = next(one for one in COLORS if one != thing.color)
        shape = next(one for one in SHAPES if one != thing.shape)
        aside = replace(thing, x=thing.x + (16 if thing.x < 32 else -16))
        for other in ((), (replace(thing, color=color),), (replace(thing, shape=shape),), (aside,)):
            things = tuple(new for one in hole.scene.things for new in (other if one is thing else (one,)))
            assert not filled(render(replace(hole.scene, things=things)), hole)


def test_what_reaches_out_of_a_box_does_not_stand_in_it(holes):
    hole = next(hole for hole in holes if len(hole.scene.things) == 1)
    picture, (left, top, width, height) = render(hole.scene), hole.box
    assert len(standing(picture, hole.box)) == 1
    assert not standing(picture, (left, top, width // 2, height))


def test_holes_are_of_three_kinds_and_the_held_out_ones_are_others():
    kinds = [hole.thing is not None for hole in islice(stream(6), 300)]
    assert 0.6 < np.mean(kinds) < 0.8
    everything = [hole for hole in islice(stream(6), 300) if hole.box == (0, 0, 64, 64)]
    assert 10 < len(everything) < 60
    assert all(held_out(hole.prompt) for hole in islice(stream(6, holdout=True), 20))
    with pytest.raises(ValueError, match="no single right filling"):
        filled(render(everything[0].scene), everything[0])
