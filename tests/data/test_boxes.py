"""Boxes of regions, and pictures that are zoomed with their masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from visiontune.data.base import Config, Sample, Source
from visiontune.data.picks import Pick
from visiontune.data.rows import Rows
from visiontune.data.transforms import Zoom, box_of, boxed, to_mask
from visiontune.errors import UserError

SIZE = (32, 32)


def reached(zoom: Zoom) -> torch.Tensor:
    """Pixels whose middle lies in the zoomed picture, bool [32, 32]."""
    x, y = (((torch.arange(32) + 0.5 - start) / zoom.factor) for start in (zoom.x, zoom.y))
    inside = [(along >= 0) & (along < 32) for along in (x, y)]
    return inside[1][:, None] & inside[0]


def region(*places: tuple[int, int]) -> torch.Tensor:
    found = torch.zeros(1, 12, 20)
    for y, x in places:
        found[0, y, x] = 1
    return found


def test_a_box_is_the_least_that_holds_a_region():
    assert box_of(region((4, 7))) == (7, 4, 1, 1)
    assert box_of(region((4, 7), (2, 9), (9, 8))) == (7, 2, 3, 8)
    found = boxed(region((4, 7), (2, 9), (9, 8)))
    assert found.sum() == 24 and found[0, 2:10, 7:10].all()
    with pytest.raises(ValueError, match="empty"):
        boxed(region())


def test_a_jitter_moves_sides_outwards_by_shares_of_the_box_and_no_further_than_the_picture():
    whole, rng = region((4, 7), (8, 11)), torch.Generator().manual_seed(0)
    boxes = {box_of(boxed(whole, 0.4, rng)) for _ in range(400)}
    lefts, rights = {b[0] for b in boxes}, {b[0] + b[2] for b in boxes}
    tops, bottoms = {b[1] for b in boxes}, {b[1] + b[3] for b in boxes}
    assert (lefts, rights, tops, bottoms) == ({5, 6, 7}, {12, 13, 14}, {2, 3, 4}, {9, 10, 11})
    assert box_of(boxed(region((0, 0), (11, 19)), 1.0, rng)) == (0, 0, 20, 12)
    assert box_of(boxed(whole, 0.0)) == (7, 4, 5, 5)


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_zoom_keeps_the_box_in_sight_and_says_where_nothing_is_left(share):
    picture = Image.fromarray(np.uint8(np.indices(SIZE)[0] * 7 + 20))
    mask = Image.new("L", SIZE)
    mask.paste(255, (18, 4, 26, 12))
    factors = set()
    for seed in range(40):
        zoom = Zoom.draw(share, SIZE, torch.Generator().manual_seed(seed), (18, 4, 8, 8))
        factors.add(zoom.factor)
        left, top, width, height = box_of(to_mask(mask, SIZE, 1, zoom=zoom).round())
        assert abs(width - 8 * zoom.factor) <= 1.5 and abs(height - 8 * zoom.factor) <= 1.5
        assert abs(left - (18 * zoom.factor + zoom.x)) <= 1 and abs(top - (4 * zoom.factor + zoom.y)) <= 1
        counts = to_mask(Image.new("L", (1, 1), 255), SIZE, 1, zoom=zoom)[0] == 1
        shown = torch.from_numpy(np.array(zoom.of(picture, Image.Resampling.BILINEAR)))
        assert torch.equal(counts, reached(zoom)) and torch.equal(counts, shown >= 20)
    assert 1 - share <= min(factors) < 1 - 0.8 * share and 1 + 0.8 * share < max(factors) <= 1 + share


@pytest.fixture
def sample():
    """A picture of 32 pixels a side, white in a corner of 5 by 3, which is the region too."""
    where = Image.new("L", SIZE)
    where.paste(255, (21, 6, 26, 9))
    picture = Image.merge("RGB", [where] * 3)
    return Sample(
        id="a", sources={"image": Source(lambda: picture), "region": Source(lambda: where, "mask")}, caption="a"
    )


def rows_of(model, sample, tmp_path, **options) -> Rows:
    model.paints, model.channels = True, lambda hidden, masks: masks
    return Rows(model, [sample], Config(root="none", **options), tmp_path)


def test_rows_are_painted_in_a_box_that_other_visits_move(model, sample, tmp_path):
    given, box = (rows_of(model, sample, tmp_path, box=box) for box in (False, True))
    pick = Pick(index=0, size=SIZE, seed=3)
    assert torch.equal(given.channels(pick), box.channels(pick))
    moved = rows_of(model, sample, tmp_path, box=True, box_jitter=1.0)
    first, again, other = (moved.channels(Pick(index=0, size=SIZE, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all((one >= given.channels(pick)).all() for one in (first, other))


def test_a_crop_that_leaves_nothing_of_a_region_is_refused(model, sample, tmp_path):
    rows = rows_of(model, sample, tmp_path, box=True)
    with pytest.raises(UserError, match=r"leaves nothing of the region of a: set data\.crop=center"):
        rows.channels(Pick(index=0, size=(32, 8)))


def test_what_a_zoom_leaves_empty_does_not_count(model, sample, tmp_path):
    rows = rows_of(model, sample, tmp_path, zoom=0.5, cache=False)
    shares = set()
    for seed in range(12):
        batch = rows.collate([Pick(index=0, size=SIZE, seed=seed)])
        zoom = Zoom.draw(0.5, SIZE, torch.Generator().manual_seed(seed + 2), (21, 6, 5, 3))
        mask, image = batch.data["mask"], batch.data["image"]
        # A latent counts if all of its pixels do.
        whole = torch.nn.functional.avg_pool2d(reached(zoom).float()[None, None], 2) == 1
        assert torch.equal(mask, whole.float())
        shares.add(float(mask.mean()))
        # The region moves with the picture, whose only light is there.
        latents = torch.nn.functional.avg_pool2d(batch.data["channels"], 2)
        assert (image.mean(1, keepdim=True)[latents == 0] < 0.2).all()
    assert min(shares) < 0.5 and max(shares) == 1


def test_a_zoom_counts_what_the_data_count(model, sample, tmp_path):
    half = Image.new("L", SIZE)
    half.paste(255, (0, 0, 16, 32))
    sample.sources["mask"] = Source(lambda: half, "mask")
    rows, all_of_it = (rows_of(model, sample, tmp_path, zoom=zoom, cache=False) for zoom in (0.5, 1e-9))
    for seed in range(6):
        pick = Pick(index=0, size=SIZE, seed=seed)
        found, whole = (one.collate([pick]).data["mask"] for one in (rows, all_of_it))
        assert whole.mean() == 0.5 and found.max() <= 1 and found.mean() != 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"zoom": 0.2}, r"data\.zoom .* data\.cache=false"), ({"box_jitter": 0.2}, r"data\.box=true")],
)
def test_options_that_need_another_say_so(options, message):
    with pytest.raises(UserError, match=message):
        Config(root="none", **options)
