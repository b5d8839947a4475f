"""Objects on canvases: what is untouched, what a blending is defined by, and where an object goes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from visiontune.composition import (
    Layer,
    Place,
    as_mask,
    as_picture,
    as_pillow,
    blend,
    gaussian,
    harmonise,
    paste,
    places,
    poisson,
    suppress,
)
from visiontune.composition.colour import from_lab, to_lab
from visiontune.composition.placement import boxes
from visiontune.errors import UserError

RNG = np.random.default_rng(0)
CANVAS = RNG.uniform(0.2, 0.8, (20, 24, 3))


def layer(picture, mask, box=(4, 3, 16, 15), canvas=CANVAS):
    return Layer.of(picture, mask, canvas, box)


def disc(side=12):
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return (np.hypot(x, y) < side / 2 - 1).astype(float)


OBJECT = RNG.uniform(0, 1, (12, 12, 3))


@pytest.mark.parametrize("how", ["paste", "gaussian", "poisson"])
def test_the_canvas_is_untouched_to_the_bit_where_the_mask_is_black(how):
    placed = layer(OBJECT, disc())
    found = blend(placed, CANVAS, how)
    assert np.array_equal(found[placed.mask == 0], CANVAS[placed.mask == 0])
    assert np.abs(found - CANVAS)[placed.mask == 1].max() > 0.1


def test_a_whole_mask_shows_the_object():
    found = paste(layer(OBJECT, np.ones((12, 12))), CANVAS)
    assert np.array_equal(found[3:15, 4:16], OBJECT)
    soft = layer(OBJECT, np.full((12, 12), 0.25))
    np.testing.assert_allclose(paste(soft, CANVAS)[3:15, 4:16], 0.25 * OBJECT + 0.75 * CANVAS[3:15, 4:16], atol=1e-12)


def test_a_resized_edge_has_the_object_s_colours_alone():
    red = np.zeros((24, 24, 3))
    red[..., 1] = 1
    red[disc(24) == 1] = (1, 0, 0)
    placed = layer(red, disc(24))
    np.testing.assert_allclose(
        placed.picture[placed.mask > 0], np.broadcast_to([1, 0, 0], (int((placed.mask > 0).sum()), 3))
    )


def test_a_feather_stays_within_the_object():
    placed = layer(OBJECT, disc())
    assert np.array_equal(gaussian(placed, CANVAS, 0), paste(placed, CANVAS))
    found = gaussian(placed, CANVAS, 1.0)
    middle, edge = (9, 9), np.argwhere(placed.mask == 1)[0]
    np.testing.assert_allclose(found[middle], OBJECT[6, 5], atol=0.02)
    assert np.abs(found - CANVAS)[tuple(edge)].max() < np.abs(paste(placed, CANVAS) - CANVAS)[tuple(edge)].max()


def test_poisson_has_the_object_s_laplacian_and_the_canvas_border():
    smooth = np.stack([*np.meshgrid(np.linspace(0, 1, 12), np.linspace(0, 0.5, 12)), np.full((12, 12), 0.3)], -1)
    placed = layer(smooth, disc())
    found, inside = poisson(placed, CANVAS), placed.mask > 0.5
    for y, x in np.argwhere(inside):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        mine = sum(found[y, x] - found[one] for one in around)
        theirs = sum(placed.picture[y, x] - placed.picture[one] for one in around)
        np.testing.assert_allclose(mine, theirs, atol=1e-9)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("mask", [disc(), np.ones((12, 12))], ids=["disc", "box"])
def test_what_differs_from_the_canvas_by_a_constant_vanishes(mixed, mask):
    placed = layer(CANVAS[3:15, 4:16] + 0.1, mask)
    np.testing.assert_allclose(poisson(placed, CANVAS, mixed=mixed), CANVAS, atol=1e-9)


def test_mixed_gradients_let_the_texture_through():
    placed = layer(np.full((12, 12, 3), 0.5), disc())
    plain, mixed = poisson(placed, CANVAS), poisson(placed, CANVAS, mixed=True)
    np.testing.assert_allclose(mixed, CANVAS, atol=1e-9)
    assert plain[placed.mask > 0.5].std() < CANVAS[placed.mask > 0.5].std()


def test_an_object_at_the_edge_of_the_canvas_is_blended():
    placed = layer(OBJECT, np.ones((12, 12)), (0, 0, 12, 12))
    assert np.isfinite(poisson(placed, CANVAS)).all()


def test_lab_is_that_of_the_standard_and_comes_back():
    red = to_lab(np.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(red, [53.24, 80.09, 67.20], atol=0.02)
    np.testing.assert_allclose(to_lab(np.ones(3)), [100, 0, 0], atol=1e-9)
    np.testing.assert_allclose(from_lab(to_lab(OBJECT)), OBJECT, atol=1e-9)


def test_a_harmonised_object_has_the_scene_s_statistics():
    canvas = 0.5 + 0.1 * RNG.standard_normal((40, 40, 3)).clip(-1, 1)
    placed = layer(0.4 + 0.05 * RNG.standard_normal((12, 12, 3)).clip(-1, 1), disc(), canvas=canvas)
    inside = placed.mask > 0.5
    found = to_lab(harmonise(placed, canvas).picture)[inside]
    scene = to_lab(canvas)[~inside]
    np.testing.assert_allclose(found.mean(0), scene.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.std(0), scene.std(0), atol=1e-6)
    assert harmonise(placed, canvas, 0) is placed
    flat = harmonise(layer(np.full((12, 12, 3), 0.9), disc(), canvas=canvas), canvas).picture[inside]
    np.testing.assert_allclose(to_lab(flat), np.broadcast_to(scene.mean(0), flat.shape), atol=1e-6)


def test_the_search_finds_the_box_that_the_scorer_likes():
    def likes(picture, mask):
        y, x = np.argwhere(mask > 0.5).mean(0)
        return -abs(y - 10) - abs(x - 18) - abs(mask.sum() - 100) / 100

    found = places(OBJECT, np.ones((12, 12)), CANVAS, likes, grid=12, scales=(0.3, 0.5, 0.7), best=2, overlap=0.3)
    left, top, right, bottom = found[0].box
    assert abs((left + right) / 2 - 18.5) <= 1.5 and abs((top + bottom) / 2 - 10.5) <= 1.5 and right - left == 10
    assert found[0].score >= found[1].score
    # Nothing tells the boxes apart: the first that is tried.
    equal = places(OBJECT, np.ones((12, 12)), CANVAS, lambda *_: 1.0, grid=4, scales=(0.3,), best=1)
    assert equal[0].box == boxes((12, 12), (20, 24), 4, (0.3,))[0]


def test_boxes_that_share_much_with_a_better_one_are_left_out():
    one, two, three = (Place(box=b, score=s) for b, s in [((0, 0, 4, 4), 1), ((1, 0, 5, 4), 3), ((6, 0, 9, 4), 2)])
    assert suppress([one, two, three], 0.5) == [two, three]
    assert suppress([one, two, three], 0.6) == [two, three, one]


@pytest.mark.parametrize(
    ("mask", "box", "words"),
    [
        (np.ones((12, 12)), (4, 3, 30, 15), r"box \[4, 3, 30, 15\] must be .* within the 24x20"),
        (np.ones((12, 12)), (4, 3, 4, 15), "must be left, top, right, bottom"),
        (np.ones((10, 12)), (4, 3, 16, 15), "the mask has 12x10 pixels and its picture 12x12"),
        (np.zeros((12, 12)), (4, 3, 16, 15), "black everywhere"),
    ],
)
def test_what_does_not_go_together_is_said(mask, box, words):
    with pytest.raises(UserError, match=words):
        layer(OBJECT, mask, box)
    with pytest.raises(UserError, match="needs some of the canvas"):
        poisson(Layer.of(CANVAS, np.ones((20, 24)), CANVAS, (0, 0, 24, 20)), CANVAS)


def test_pictures_of_pillow_come_and_go():
    picture = Image.linear_gradient("L").convert("RGB")
    assert np.array_equal(as_pillow(as_picture(picture)), picture)
    assert as_mask(Image.new("L", (4, 3), 255)).shape == (3, 4)
