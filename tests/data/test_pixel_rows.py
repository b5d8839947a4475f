"""Pictures and captions for models of both: what is cropped, flipped and said is what the recipe says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from visiontune.data.base import Config
from visiontune.data.loader import BatchSampler
from visiontune.data.picks import Pick
from visiontune.data.pixel_rows import PixelRows
from visiontune.data.readers import read
from visiontune.data.transforms import to_pixels
from visiontune.errors import UserError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i, size in enumerate([(20, 12), (12, 12), (9, 30)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    return tmp_path


def rows_of(folder, **options) -> PixelRows:
    config = Config(root=str(folder), **options)
    return PixelRows(read(config), config, 8)


def test_a_batch_has_pixels_and_captions_of_its_picks(folder):
    rows = rows_of(folder)
    assert rows.buckets == {(8, 8): [0, 1, 2]} and len(rows) == 3
    batch = rows.collate([Pick(index=2, size=(8, 8)), Pick(index=0, size=(8, 8), flip=True)])
    assert batch.prompts == ["picture 2", "picture 0"] and batch.cond is None
    assert batch.data["image"].shape == (2, 3, 8, 8)
    first, second = (to_pixels(Image.open(folder / f"{i}.png"), (8, 8)) for i in (2, 0))
    torch.testing.assert_close(batch.data["image"][0], (first + 1) / 2)
    torch.testing.assert_close(batch.data["image"][1], (second.flip(-1) + 1) / 2)


def test_random_crops_differ_by_seed_alone(folder):
    rows = rows_of(folder, crop="random", cache=False)
    once, again, other = (rows.collate([Pick(index=2, size=(8, 8), seed=seed)]).data["image"] for seed in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_every_picture_comes_before_any_comes_twice(folder):
    sampler = BatchSampler(rows_of(folder, resolution=16), batch_size=1, seed=3)
    batches = [sampler.batch(step) for step in range(3)]
    assert {batch.prompts[0] for batch in batches} == {f"picture {i}" for i in range(3)}
    assert batches[0].data["image"].shape == (1, 3, 16, 16)


def test_a_picture_without_a_caption_is_refused_by_name(folder):
    (folder / "1.txt").write_text(" ")
    with pytest.raises(UserError, match=r"1 pictures have no caption to be told from others by: .*1\.png"):
        rows_of(folder)


def test_a_damaged_picture_is_named(folder):
    rows = rows_of(folder)
    (folder / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot read image .*0\.png"):
        rows.collate([Pick(index=0, size=(8, 8))])


def test_captions_are_not_dropped(folder):
    with pytest.raises(UserError, match="caption_dropout leaves pictures without"):
        rows_of(folder, caption_dropout=0.1)
