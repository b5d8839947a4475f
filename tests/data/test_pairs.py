"""Pairs of a better and a worse image: three ways to write them, what is refused, and rows made of them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from visiontune.data.base import Config, Sample, Source
from visiontune.data.loader import BatchSampler
from visiontune.data.picks import Pick
from visiontune.data.preflight import preflight
from visiontune.data.readers import read
from visiontune.data.rows import Rows
from visiontune.data.transforms import to_pixels
from visiontune.errors import UserError

SQUARE = (32, 32)


def pairs(root, **options) -> list[Sample]:
    return read(Config(root=str(root), **options), ("image", "rejected"))


def files(samples: list[Sample], column: str) -> list:
    return [s.sources[column].file for s in samples]


def lines(folder, *rows) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def test_two_subfolders_with_equal_names(photo, tmp_path):
    for name in ("a.png", "b.jpg"):
        photo(f"chosen/{name}", caption=f"a [trigger] {name[0]}")
        photo(f"rejected/{name}")
    samples = pairs(tmp_path)
    assert [(s.id, s.caption) for s in samples] == [("a.png", "a sks a"), ("b.jpg", "a sks b")]
    assert files(samples, "rejected") == [tmp_path / "rejected/a.png", tmp_path / "rejected/b.jpg"]
    assert files(samples, "image") == [tmp_path / "chosen/a.png", tmp_path / "chosen/b.jpg"]
    preflight(samples)
    assert samples[0].sources["rejected"].open() != samples[0].sources["image"].open()
    with pytest.raises(
        UserError, match=r"rejected/ \(2 files\); an objective that needs rejected .*ignore=\[rejected\]"
    ):
        read(Config(root=str(tmp_path)))
    assert files(read(Config(root=str(tmp_path), ignore=["rejected"])), "image") == files(samples, "image")


def test_worse_pictures_in_a_subfolder_beside_the_better_ones(photo, tmp_path):
    photo("a.png", caption="x")
    photo("rejected/a.webp")
    assert files(pairs(tmp_path), "rejected") == [tmp_path / "rejected/a.webp"]


def test_lines_of_metadata_with_two_files(photo, tmp_path):
    for name in ("a.png", "worse/a.png", "b.png", "c.png"):
        photo(name)
    lines(
        tmp_path,
        {"file_name": "b.png", "text": "two", "bad": "c.png"},
        {"file_name": "a.png", "text": "one", "bad": "worse/a.png"},
    )
    samples = pairs(tmp_path, columns={"rejected": "bad"})
    assert [s.caption for s in samples] == ["one", "two"]
    assert files(samples, "rejected") == [tmp_path / "worse/a.png", tmp_path / "c.png"]
    preflight(samples)
    with pytest.raises(UserError, match=r"line 1 names no file as 'rejected'"):
        pairs(tmp_path)
    with pytest.raises(UserError, match=r"names no file as 'bat'; did you mean 'bad'\?"):
        pairs(tmp_path, columns={"rejected": "bat"})
    with pytest.raises(UserError, match=r"reads here: worse/ \(1 file\), 'bad' in metadata.jsonl"):
        read(Config(root=str(tmp_path)))
    single = read(Config(root=str(tmp_path), ignore=["bad", "worse"]))
    assert [s.id for s in single] == ["a.png", "b.png"] and all(s.sources.keys() == {"image"} for s in single)


def test_a_picture_that_the_lines_leave_out_lacks_its_partner(photo, tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        photo(name)
    lines(tmp_path, {"file_name": "a.png", "text": "one", "rejected": "b.png"})
    with pytest.raises(UserError, match=r"1 samples that lack a column .*: c\.png \(rejected\)$"):
        preflight(pairs(tmp_path))


def png(seed: int) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def test_a_table_with_two_columns_of_images(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    table = datasets.Dataset.from_dict(
        {"image": [png(0), png(1)], "loser": [png(2), png(3)], "text": ["one", "two"], "number": [1.0, 2.0]}
    )
    (tmp_path / "data").mkdir()
    file = tmp_path / "data/t.parquet"
    table.to_parquet(str(file))
    samples = pairs(file, columns={"rejected": "loser"})
    preflight(samples)
    found = [np.asarray(s.sources["rejected"].open()) for s in samples]
    wanted = [np.asarray(Image.open(io.BytesIO(png(seed)["bytes"]))) for seed in (2, 3)]
    assert all(np.array_equal(*both) for both in zip(found, wanted, strict=True))
    assert np.array_equal(
        np.asarray(samples[1].sources["image"].open()), np.asarray(Image.open(io.BytesIO(png(1)["bytes"])))
    )
    with pytest.raises(UserError, match=r"pictures that nothing reads here, in loser: .*data\.ignore=\[loser\]"):
        read(Config(root=str(file)))
    single = read(Config(root=str(file), ignore=["loser"]))
    assert len(single) == 2 and all(s.sources.keys() == {"image"} for s in single)
    with pytest.raises(UserError, match=r"no column 'rejected' .*set data\.columns\.rejected"):
        pairs(file.parent)
    with pytest.raises(UserError, match=r"column 'number' .* holds no images .*set data\.columns\.rejected"):
        pairs(file, columns={"rejected": "number"})


def test_pairs_of_the_pocket_world_show_one_scene_twice():
    sample = pairs("pocket/pairs")[7]
    better, worse = (np.asarray(s.open()).astype(int) for s in (sample.sources["image"], sample.sources["rejected"]))
    assert 0 < (better != worse).any(-1).mean() < 0.7
    with pytest.raises(UserError, match=r"pocket/bumble has no 'rejected' pictures; pocket/pairs has"):
        pairs("pocket/bumble")


def test_an_image_without_its_partner_is_refused_by_name(photo, tmp_path):
    for name in ("a", "b"):
        photo(f"chosen/{name}.png", caption=name)
    photo("chosen/broken.png", caption="x")
    for name in ("b", "c"):
        photo(f"rejected/{name}.png")
    (tmp_path / "rejected/broken.png").write_text("no picture")
    with pytest.raises(UserError) as caught:
        preflight(pairs(tmp_path))
    broken, half = str(caught.value).split("; ")
    assert broken.startswith("1 unreadable") and "broken.png" in broken
    assert half.startswith("2 samples that lack a column") and half.endswith(
        ": a.png (rejected), rejected/c.png (image)"
    )


def test_data_without_pairs_is_refused(photo, tmp_path):
    photo("a.png", caption="x")
    with pytest.raises(
        UserError, match=r"no 'rejected' pictures: put .*subfolder chosen, with the captions.*'rejected' in meta"
    ):
        pairs(tmp_path)


# ---------------------------------------------------------------------------------------------------- rows


@pytest.fixture
def rows(model, photo, tmp_path):
    samples = [
        Sample(
            id=f"{i}.png",
            sources={"image": Source(photo(f"{i}.png")), "rejected": Source(photo(f"worse/{i}.png"))},
            caption=f"number {i}",
        )
        for i in range(3)
    ]

    def build(**options) -> Rows:
        return Rows(model, samples, Config(root="x", **options), tmp_path / "cache")

    return build


def test_both_latents_of_a_row_come_with_one_flip_and_one_draw(rows, model):
    made = rows()
    assert len(made) == 3 and made.buckets == {SQUARE: [0, 1, 2]} and made.prior == []
    picks = [Pick(index=2, size=SQUARE, flip=True, seed=5), Pick(index=0, size=SQUARE, seed=6)]
    batch = made.collate(picks)
    for row, (index, flip) in enumerate(((2, True), (0, False))):
        eps = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5 + row))
        sample = made.samples[index]
        for name, source in sample.sources.items():
            moments = model.moments(to_pixels(source.open(), SQUARE, flip=flip)[None])
            torch.testing.assert_close(batch.data[name][row], model.latents_from_moments(moments, eps)[0])
    assert batch.ids == ["2.png", "0.png"] and batch.prompts == ["number 2", "number 0"]
    assert torch.equal(batch[1].data["rejected"], batch.data["rejected"][1:])


@pytest.mark.parametrize("flip", [False, True])
def test_both_images_are_encoded_once(rows, model, flip):
    made = rows(flip=flip)
    made.fill()
    assert (model.encoded, model.embedded) == (6 * (1 + flip), 3)
    sampler = BatchSampler(made, 2)
    for step in range(9):
        batch = sampler.batch(step)
        assert batch.data["rejected"].shape == batch.data["image"].shape
    assert model.encoded == 6 * (1 + flip)


def test_a_sample_without_what_others_have_is_refused(model, photo, tmp_path):
    image = Source(photo("a.png"))
    whole = Sample(id="whole", sources={"image": image, "rejected": image}, caption="x")
    for options in ({}, {"prior": True}):
        half = Sample(id="half", sources={"image": image}, caption="x", **options)
        with pytest.raises(UserError, match="1 samples have no rejected, as others have: half"):
            Rows(model, [whole, half], Config(root="x"), tmp_path / "cache")
    single = Rows(
        model, [half, Sample(id="a", sources={"image": image}, caption="x")], Config(root="x"), tmp_path / "cache"
    )
    assert single.collate([Pick(index=1, size=SQUARE)]).data.keys() == {"image"}
