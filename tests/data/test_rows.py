from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from visiontune.data.base import Config, Sample, Source
from visiontune.data.picks import Pick
from visiontune.data.rows import Rows
from visiontune.data.transforms import to_pixels
from visiontune.errors import UserError

SQUARE = (32, 32)


def picks(count: int, **options) -> list[Pick]:
    return [Pick(index=i, size=SQUARE, seed=i, **options) for i in range(count)]


@pytest.fixture
def samples(photo) -> list[Sample]:
    return [
        Sample(id=f"{i}.png", sources={"image": Source(photo(f"{i}.png"))}, caption=f"picture number {i}")
        for i in range(3)
    ]


@pytest.fixture
def rows(model, samples, tmp_path):
    """Builds Rows with a shared cache folder: ``rows(config options, model=..., samples=..., train_text=...)``."""

    def build(model=model, samples=samples, train_text=False, **options) -> Rows:
        return Rows(model, samples, Config(root="x", **options), tmp_path / "cache", train_text)

    return build


# ---------------------------------------------------------------------------------------------------- contents


def test_a_batch_holds_what_its_samples_say(rows, samples, model):
    samples.append(
        Sample(id="p", sources={"image": samples[0].sources["image"]}, caption="a dog", prior=True, weight=0.5)
    )
    batch = rows(samples=samples).collate([Pick(index=3, size=SQUARE, seed=7), Pick(index=1, size=SQUARE, seed=8)])
    assert batch.ids == ["p", "1.png"]
    assert batch.prompts == ["a dog", "picture number 1"]
    assert batch.prior.tolist() == [True, False]
    assert batch.weight.tolist() == [0.5, 1.0] and batch.weight.dtype == torch.float32
    for row, i in enumerate((3, 1)):
        moments = model.moments(to_pixels(samples[i].sources["image"].open(), SQUARE)[None])
        eps = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(7 + row))
        torch.testing.assert_close(batch.data["image"][row], model.latents_from_moments(moments, eps[None])[0])
        expected = model.embed([samples[i].caption])
        assert torch.equal(batch.cond[row].tokens, expected.tokens)
        assert torch.equal(batch.cond[row].mask, expected.mask)
        assert torch.equal(batch.cond[row].extra["length"], expected.extra["length"])


def test_latents_are_drawn_anew_for_every_seed(rows):
    r = rows()
    one, again, other = (r.collate([Pick(index=0, size=SQUARE, seed=s)]).data["image"] for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert (one - other).std() > 0.1  # the deviation is 0.25


def test_flip_and_size_reach_the_pixels(rows, samples):
    r = rows()
    plain, flipped = (r.moments(Pick(index=0, size=SQUARE, flip=f)) for f in (False, True))
    torch.testing.assert_close(flipped, plain.flip(-1))
    assert r.moments(Pick(index=0, size=(16, 48))).shape == (6, 8, 24)


def test_images_are_put_into_the_bucket_of_their_shape(rows, photo, model):
    model.resolution = 512
    shapes = {"wide.png": (60, 40), "tall.png": (40, 60), "even.png": (50, 50), "broad.png": (61, 40)}
    samples = [Sample(id=n, sources={"image": Source(photo(n, size=s))}, caption="x") for n, s in shapes.items()]
    groups = rows(samples=samples).buckets
    named = [{samples[i].id for i in group} for group in groups.values()]
    assert sorted(map(sorted, named)) == [["broad.png", "wide.png"], ["even.png"], ["tall.png"]]
    for (height, width), group in groups.items():
        picture = samples[group[0]].sources["image"].open()
        assert abs(np.log(height / width) - np.log(picture.height / picture.width)) < 0.12
    assert list(rows(samples=samples, buckets=False).buckets) == [(512, 512)]
    assert list(rows(samples=samples, buckets=False, resolution=64).buckets) == [(64, 64)]


def test_random_crops_follow_the_seed(rows, photo):
    sample = Sample(id="w", sources={"image": Source(photo("w.png", size=(96, 32)))}, caption="x")
    r = rows(samples=[sample], crop="random", cache=False)
    one, again, other = (r.moments(Pick(index=0, size=SQUARE, seed=s)) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_real_model_gives_the_latents_and_conditions_that_its_encoders_give(rows, photo):
    model = tiny_model("sd")
    samples = [
        Sample(id=str(i), sources={"image": Source(photo(f"{i}.png", size=(16, 16)))}, caption="a red circle")
        for i in range(2)
    ]
    r = rows(model=model, samples=samples)
    for _ in range(2):  # encoded, then read back
        batch = r.collate([Pick(index=1, size=(16, 16), seed=5), Pick(index=0, size=(16, 16), drop=True)])
        pixels = to_pixels(samples[1].sources["image"].open(), (16, 16))[None]
        with torch.no_grad():
            latents = model.encode(pixels, generator=torch.Generator().manual_seed(5))
            tokens = torch.cat([model.embed(["a red circle"]).tokens, model.unconditional(1).tokens])
        torch.testing.assert_close(batch.data["image"][:1], latents)
        torch.testing.assert_close(batch.cond.tokens, tokens)
    assert not batch.data["image"].requires_grad and not batch.cond.tokens.requires_grad


# ---------------------------------------------------------------------------------------------------- caches


def test_a_second_run_encodes_nothing_and_gets_the_same_bits(rows, model):
    first = rows(flip=True)
    first.fill()
    assert (model.encoded, model.embedded) == (6, 3)
    a = first.collate(picks(3, flip=True))
    b = rows(flip=True).collate(picks(3, flip=True))
    assert (model.encoded, model.embedded) == (6, 3)
    assert torch.equal(a.data["image"], b.data["image"]) and torch.equal(a.cond.tokens, b.cond.tokens)


def test_without_the_latent_cache_the_values_are_the_same_and_nothing_is_stored(rows, model, tmp_path):
    plain = rows(cache=False)
    plain.fill()
    batch = plain.collate(picks(3))
    assert not list((tmp_path / "cache").glob("latents/*"))
    assert torch.equal(batch.data["image"], rows().collate(picks(3)).data["image"])


@pytest.mark.parametrize("part", ["vae", "text"])
def test_another_encoder_encodes_its_own_part_again_and_no_other(rows, model, part):
    rows().fill()
    other = type(model)(**{part: "changed"})
    rows(model=other).fill()
    assert (other.encoded, other.embedded) == ((3, 0) if part == "vae" else (0, 3))


def test_a_changed_image_under_the_same_name_is_encoded_again(rows, model, samples, photo):
    before = rows().collate(picks(3))
    photo("1.png", seed=99)
    after = rows().collate(picks(3))
    assert model.encoded == 4
    assert [torch.equal(a, b) for a, b in zip(before.data["image"], after.data["image"], strict=True)] == [
        True,
        False,
        True,
    ]


def test_a_changed_caption_is_embedded_again_and_images_are_not(rows, model, samples):
    rows().fill()
    changed = Sample(id=samples[1].id, sources={"image": samples[1].sources["image"]}, caption="another")
    batch = rows(samples=[samples[0], changed, samples[2]]).collate(picks(3))
    assert (model.encoded, model.embedded) == (3, 4)
    assert torch.equal(batch.cond[1].tokens, model.embed(["another"]).tokens)


def test_another_transform_is_another_entry(rows, model, monkeypatch):
    rows().fill()
    rows(resolution=16).fill()
    assert model.encoded == 6
    monkeypatch.setattr("visiontune.data.transforms.RECIPE", "another")
    rows().fill()
    assert model.encoded == 9


def test_entries_follow_content_not_position(rows, model, samples):
    rows().fill()
    removed = rows(samples=samples[1:]).collate(picks(2))
    assert (model.encoded, model.embedded) == (3, 3)
    assert removed.prompts == ["picture number 1", "picture number 2"]
    expected = model.moments(to_pixels(samples[1].sources["image"].open(), SQUARE)[None])[0]
    torch.testing.assert_close(rows(samples=samples[1:]).moments(picks(1)[0]), expected)


def test_pictures_without_a_file_are_cached_by_their_pixels(rows, model):
    def sample(level: int) -> Sample:
        return Sample(
            id="same", sources={"image": Source(lambda: Image.new("RGB", (32, 32), (level,) * 3))}, caption="x"
        )

    assert rows(samples=[sample(0)]).collate(picks(1)).data["image"].mean() < -0.9
    assert rows(samples=[sample(255)]).collate(picks(1)).data["image"].mean() > 0.9


def test_ranks_share_the_filling(rows, model, samples, tmp_path):
    for rank in range(2):
        rows().fill(rank, 2)
        assert model.encoded == (2, 3)[rank]


def test_a_file_that_changes_while_it_is_encoded_never_enters_the_cache(rows, model, photo):
    r = rows()
    encode = model.moments
    model.moments = lambda pixels: (photo("0.png", seed=5), encode(pixels))[1]
    with pytest.raises(UserError, match=r"0\.png changed"):
        r.collate(picks(1))
    model.moments = encode
    fresh = rows().moments(picks(1)[0])
    torch.testing.assert_close(fresh, encode(to_pixels(r.samples[0].sources["image"].open(), SQUARE)[None])[0])


# ---------------------------------------------------------------------------------------------------- text


def test_a_caption_is_hashed_and_read_from_the_disk_once(rows, tmp_path, monkeypatch):
    from visiontune.data import cache
    from visiontune.data import rows as module

    rows().fill()
    hashed, read = [], []
    keyed, opened = module.key, cache.safe_open
    monkeypatch.setattr(module, "key", lambda **parts: hashed.append(parts) or keyed(**parts))
    monkeypatch.setattr(cache, "safe_open", lambda *a: read.append(a) or opened(*a))
    r = rows()
    for _ in range(3):
        r.collate(picks(3))
    assert sum("caption" in parts for parts in hashed) == 3
    assert sum("text" in path.parts for path, _ in read) == 3 and len(read) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conditions_keep_the_number_format_of_the_encoder(rows, model, tmp_path, dtype):
    embed = model.embed
    model.embed = lambda prompts: embed(prompts).to(dtype=dtype)
    made = rows().condition("a caption")
    stored = rows().condition("a caption")
    assert made.tokens.dtype == stored.tokens.dtype == dtype and torch.equal(made.tokens, stored.tokens)
    (file,) = (tmp_path / "cache" / "text").rglob("*.safetensors")
    bits = stored.tokens.element_size() * stored.tokens.numel() + stored.extra["length"].element_size() + 48
    assert bits <= file.stat().st_size < bits + 600
    assert model.embedded == 1


def test_dropped_captions_are_unconditional_and_leave_the_cache_alone(rows, model):
    r = rows(caption_dropout=0.5)
    r.fill()
    dropped = r.collate(picks(3, drop=True))
    assert dropped.prompts == ["", "", ""]
    assert torch.equal(dropped.cond.tokens, model.unconditional(3).tokens)
    kept = r.collate(picks(3))
    assert torch.equal(kept.cond.tokens, model.embed(kept.prompts).tokens)


def test_a_training_text_encoder_is_left_to_the_objective(rows, model, tmp_path):
    r = rows(train_text=True)
    r.fill()
    batch = r.collate([*picks(2), Pick(index=2, size=SQUARE, drop=True)])
    assert batch.cond is None and model.embedded == 0
    assert batch.prompts == ["picture number 0", "picture number 1", ""]
    assert not (tmp_path / "cache" / "text").exists()


# ---------------------------------------------------------------------------------------------------- refusals


def test_samples_without_an_instance_are_refused(rows, samples):
    prior = Sample(id="p", sources={"image": samples[0].sources["image"]}, caption="x", prior=True)
    with pytest.raises(UserError, match="no images to train on"):
        rows(samples=[prior])


def test_an_unreadable_image_is_refused_by_name(rows, samples, tmp_path):
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot read image 1\.png"):
        rows().fill()


def test_a_latent_that_is_not_finite_is_refused_and_not_stored(rows, model, tmp_path):
    model.moments = lambda pixels: torch.full((1, 6, 16, 16), torch.nan)
    with pytest.raises(UserError, match=r"no finite latent for 0\.png"):
        rows().collate(picks(1))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
