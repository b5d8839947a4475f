from __future__ import annotations

import pytest

from visiontune.data import buckets
from visiontune.errors import UserError


@pytest.mark.parametrize(("resolution", "downsample"), [(512, 8), (1024, 8), (768, 8), (64, 4)])
def test_sizes_keep_the_budget_the_grid_and_the_aspect_limit(resolution, downsample):
    sizes = buckets.sizes(resolution, downsample)
    assert sizes[0] == (resolution, resolution)
    assert len(sizes) == len(set(sizes))
    for height, width in sizes:
        assert height * width <= resolution**2
        assert height % (8 * downsample) == width % (8 * downsample) == 0
        assert max(height / width, width / height) <= 2
        assert (width, height) in sizes


def test_sd_has_portraits_and_landscapes_and_the_pocket_model_its_square_alone():
    assert {(512, 512), (640, 384), (576, 448), (384, 640)} <= set(buckets.sizes(512, 8))
    assert buckets.sizes(64, 4) == [(64, 64)]
    assert buckets.sizes(512, 8, square=True) == [(512, 512)]


def test_a_square_off_the_bucket_grid_is_kept_as_asked():
    sizes = buckets.sizes(520, 8)
    assert sizes[0] == (520, 520)
    assert len(sizes) > 3 and all(side % 64 == 0 for size in sizes[1:] for side in size)


def test_nearest_compares_aspect_ratios_whatever_the_scale():
    sizes = buckets.sizes(512, 8)
    assert buckets.nearest((100, 100), sizes) == (512, 512)
    for size in sizes:
        assert buckets.nearest((size[0] * 7, size[1] * 7), sizes) == size
    assert buckets.nearest((4000, 100), sizes) == max(sizes, key=lambda s: s[0] / s[1])
    # Geometrically 1.5 is nearer to 2 than to 1: by differences of ratios the two sides would not be treated alike.
    assert buckets.nearest((150, 100), [(1, 1), (2, 1)]) == (2, 1)
    assert buckets.nearest((100, 150), [(1, 1), (1, 2)]) == (1, 2)


@pytest.mark.parametrize("resolution", [500, 0, -64])
def test_a_resolution_off_the_latent_grid_is_refused_with_the_mend(resolution):
    with pytest.raises(UserError, match=rf"data\.resolution {resolution} .* take \d+"):
        buckets.sizes(resolution, 8)


def test_a_model_of_patches_has_a_coarser_grid_than_its_latents():
    with pytest.raises(UserError, match="520 is no multiple of 16: take 512"):
        buckets.sizes(520, 8, 16)
    assert buckets.sizes(528, 8, 16)[0] == (528, 528)
    sizes = buckets.sizes(1056, 8, 48)
    assert len(sizes) > 3 and all(side % 192 == 0 for size in sizes[1:] for side in size)
