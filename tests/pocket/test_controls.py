"""Maps of the pocket world that drawings follow: what they show, and what following them is."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from visiontune.data import numbered
from visiontune.data.procedural import Spec
from visiontune.errors import UserError
from visiontune.pocket.controls import CELL, colors, followed, sketch
from visiontune.pocket.scenes import stream
from visiontune.pocket.world import COLORS, Scene, Thing, coverage, render

SCENES = [scene for scene, _ in islice(stream(3), 12)]
RED = Thing(shape="square", color="red", x=20.0, y=24.0, radius=10.0)
BLUE = Thing(shape="circle", color="blue", x=46.0, y=40.0, radius=10.0)


def test_a_sketch_is_the_outlines_and_knows_no_colours():
    for scene in SCENES:
        lines = sketch(render(scene))
        assert set(np.unique(lines)) == {0, 255}
        repainted = replace(scene, things=tuple(replace(one, color="cyan") for one in scene.things))
        # Edges fade into grounds differently by colour.
        assert (sketch(render(repainted)) != lines).mean() < 0.03
        for thing in scene.things:
            inside = coverage(thing.shape, thing.x, thing.y, thing.radius) > 0.5
            near = ndimage.binary_dilation(inside, iterations=2) & ~ndimage.binary_erosion(inside, iterations=2)
            assert lines[..., 0][near].mean() / 255 > 0.35
            assert not lines[ndimage.binary_erosion(inside, iterations=3)].any()
    assert not sketch(render(Scene(things=(), texture="checked"))).any()


def test_a_map_of_colours_has_those_of_the_objects_in_cells():
    found = colors(render(Scene(things=(RED, BLUE))))
    cells = found[::CELL, ::CELL]
    assert np.array_equal(found, cells.repeat(CELL, 0).repeat(CELL, 1))
    assert np.abs(cells[3, 2].astype(int) - COLORS["red"]).max() < 10
    assert np.abs(cells[5, 5].astype(int) - COLORS["blue"]).max() < 10
    assert not cells[0].any() and not cells[7].any()


def test_following_is_having_the_objects_in_their_place():
    for scene in SCENES:
        assert followed(render(scene), scene) == {"shape": 1.0, "color": 1.0, "both": 1.0}
    scene = Scene(things=(RED, BLUE))
    changed = replace(scene, things=(replace(RED, shape="circle"), replace(BLUE, color="green")))
    assert followed(render(changed), scene) == {"shape": 0.5, "color": 0.5, "both": 0.0}
    moved = replace(scene, things=(replace(RED, x=44.0, y=16.0),))
    assert followed(render(moved), scene) == {"shape": 0.0, "color": 0.0, "both": 0.0}


def test_maps_are_pictures_of_the_catalogue():
    scenes = [scene for scene, _ in islice(stream(71, holdout=True), 3)]
    for name, of_picture in (("sketches", sketch), ("colors", colors)):
        found = np.array(numbered.picture(f"pocket/{name}/2"))
        assert np.array_equal(found, of_picture(render(scenes[2])))
    with pytest.raises(UserError, match="a map has no worse image"):
        Spec(world="scenes", map="sketch", rejected_style="flat")


def test_the_script_blackens_one_side_of_some_maps():
    folder = str(Path(__file__).parents[2] / "pipelines" / "pretrain")
    sys.path.insert(0, folder)
    try:
        script = importlib.import_module("picture_to_control")
    finally:
        sys.path.remove(folder)
    found = script.partly(torch.ones(400, 3, 16, 16), torch.Generator().manual_seed(0))
    whole = found.flatten(1).bool().all(1)
    assert 0.68 < whole.float().mean() < 0.85
    left = found[~whole]
    assert set(left.unique().tolist()) == {0.0, 1.0} and 0.3 < left.mean() < 0.7
    assert torch.equal(left[:, 0], left[:, 1])
