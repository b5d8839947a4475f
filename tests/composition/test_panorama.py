"""Panoramas: geometry there and back, what views keep, and runs that go on."""

from __future__ import annotations

import numpy as np
import pytest

from visiontune.composition.panorama import Panorama, View, paint
from visiontune.errors import UserError

AROUND = [View(longitude=a, prompt=f"wall {a}") for a in (0, 60, 120, 180, 240, 300)]


def known_panorama(height=64):
    made = Panorama.empty(height)
    lon = (np.arange(2 * height) + 0.5) / height * np.pi
    lat = (np.arange(height) + 0.5) / height * np.pi
    flat, up = np.sin(lat)[:, None], np.cos(lat)[:, None] + 0 * lon
    made.picture[:] = 0.5 + 0.25 * np.stack([np.sin(lon) * flat, np.cos(lon) * flat, up], -1)
    made.known[:] = True
    return made


@pytest.mark.parametrize(
    "view",
    [
        View(longitude=a, latitude=b, field=f, prompt="")
        for a, b, f in [(0, 0, 90), (75, 20, 60), (-170, -50, 110), (180, 85, 90)]
    ],
)
def test_a_ray_is_seen_where_it_came_from(view):
    rays = view.rays(16)
    rows, columns = np.mgrid[:16, :16]
    np.testing.assert_allclose(view.pixels(rays, 16), np.stack([rows, columns], -1), atol=1e-9)
    assert np.isnan(view.pixels(-rays, 16)).all()


def test_the_middle_of_a_view_is_where_it_looks():
    ahead = View(longitude=90, latitude=30, prompt="").rays(3)[1, 1]
    np.testing.assert_allclose(ahead, [np.cos(np.pi / 6), 0.5, 0], atol=1e-12)
    # Right in a view is right in the panorama, and up is up.
    rays = View(longitude=0, prompt="").rays(3)
    assert rays[1, 2, 0] > 0 and rays[0, 1, 1] > 0


def test_a_view_shows_the_world_and_puts_it_back():
    world = known_panorama(128)
    view = View(longitude=170, latitude=15, field=80, prompt="")
    seen, known = world.show(view, 96)
    assert known.all()
    x, y, z = np.moveaxis(view.rays(96), -1, 0)
    expected = 0.5 + 0.25 * np.stack([-x, -z, y], -1)  # what `known_panorama` is in these directions
    np.testing.assert_allclose(seen, expected, atol=2e-3)
    other = Panorama.empty(128)
    count = other.put(view, seen)
    assert count == other.known.sum() > 1000
    np.testing.assert_allclose(other.picture[other.known], world.picture[other.known], atol=5e-3)


def test_what_is_known_stays_and_is_not_painted_again():
    world, calls = known_panorama(), []

    def painter(shown, mask, prompt):
        calls.append(prompt)
        return [np.ones_like(shown)]

    before = world.picture.copy()
    paint(world, AROUND, painter, size=32)
    assert calls == [] and np.array_equal(world.picture, before)


def test_views_are_painted_into_the_holes_that_those_before_have_left():
    masks = []

    def painter(shown, mask, prompt):
        masks.append(mask.copy())
        return [np.where(mask[..., None], len(masks) / 10, shown)]

    world = paint(Panorama.empty(64), AROUND, painter, size=48)
    assert masks[0].all() and all(0 < mask.mean() < 1 for mask in masks[1:])
    assert masks[-1].mean() < masks[1].mean()  # closed on both sides
    assert world.known[32].all() and not world.known[0].any()  # the horizon all around, and nothing above
    # The first view's wall is there as it was painted.
    np.testing.assert_allclose(world.picture[32, 64], 0.1, atol=1e-9)


def test_the_judge_picks_and_equal_candidates_are_the_first():
    def painter(shown, mask, prompt):
        return [np.full_like(shown, value) for value in (0.2, 0.8, 0.4)]

    best = paint(Panorama.empty(32), AROUND[:1], painter, size=16, judge=lambda one, *_: one.mean())
    assert best.picture[best.known].min() > 0.79
    first = paint(Panorama.empty(32), AROUND[:1], painter, size=16, judge=lambda *_: 1.0)
    np.testing.assert_allclose(first.picture[first.known], 0.2)


def test_a_run_goes_on_where_it_was_killed(tmp_path):
    def painter(shown, mask, prompt):
        rng = np.random.default_rng(int(prompt.split()[1]))
        return [np.where(mask[..., None], rng.uniform(size=shown.shape), shown)]

    whole = paint(Panorama.empty(32), AROUND, painter, size=24)

    def killed(shown, mask, prompt):
        if prompt == "wall 180":
            raise KeyboardInterrupt
        return painter(shown, mask, prompt)

    file = tmp_path / "room.npz"
    with pytest.raises(KeyboardInterrupt):
        paint(Panorama.empty(32), AROUND, killed, size=24, file=file)
    found = Panorama.load(file)
    assert found.done == 3
    paint(found, AROUND, painter, size=24, file=file)
    assert np.array_equal(found.picture, whole.picture) and np.array_equal(found.known, whole.known)


def test_mistakes_are_said(tmp_path):
    with pytest.raises(UserError, match="painter of view 0 must give pictures of 16x16"):
        paint(Panorama.empty(32), AROUND, lambda *_: [np.zeros((8, 8, 3))], size=16)
    (tmp_path / "x.npz").write_bytes(b"no")
    with pytest.raises(UserError, match="is no saved panorama"):
        Panorama.load(tmp_path / "x.npz")
