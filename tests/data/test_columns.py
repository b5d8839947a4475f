"""Columns besides the image: where they may lie, what stops a run, and what rows make of them."""

from __future__ import annotations

import io
import json
import os

import pytest
import torch
from PIL import Image

from visiontune.data.base import Config, Sample, Source
from visiontune.data.loader import BatchSampler
from visiontune.data.picks import Pick
from visiontune.data.preflight import preflight
from visiontune.data.readers import read
from visiontune.data.rows import Rows
from visiontune.data.transforms import to_mask, to_pixels
from visiontune.errors import UserError
from visiontune.schema import from_mapping

SQUARE = (32, 32)


def masked(root, **options) -> list[Sample]:
    return read(Config(root=str(root), **options), ("image",), ("mask",))


def edits(root, **options) -> list[Sample]:
    return read(Config(root=str(root), **options), ("target", "source"))


def files(sample: Sample, root) -> dict[str, str]:
    return {name: source.file.relative_to(root).as_posix() for name, source in sample.sources.items()}


# ---------------------------------------------------------------------------------------------------- places


def test_a_subfolder_beside_the_pictures_is_a_column(photo, tmp_path):
    for name in ("a.jpg", "b.png"):
        photo(name, caption=name)
        photo(f"mask/{name[0]}.png")
    samples = masked(tmp_path)
    assert [files(s, tmp_path) for s in samples] == [
        {"image": "a.jpg", "mask": "mask/a.png"},
        {"image": "b.png", "mask": "mask/b.png"},
    ]
    assert {name: source.kind for name, source in samples[0].sources.items()} == {"image": "picture", "mask": "mask"}
    preflight(samples)
    (tmp_path / "mask").rename(tmp_path / "alpha")
    renamed = masked(tmp_path, columns={"mask": "alpha"})
    assert [files(s, tmp_path)["mask"] for s in renamed] == ["alpha/a.png", "alpha/b.png"]


def test_the_pictures_may_have_a_subfolder_of_their_own_too(photo, tmp_path):
    photo("image/a.png", caption="x")
    photo("mask/a.png")
    (sample,) = masked(tmp_path)
    assert files(sample, tmp_path) == {"image": "image/a.png", "mask": "mask/a.png"} and sample.caption == "x"


def test_the_first_column_has_the_captions_and_need_not_be_the_image(photo, tmp_path):
    photo("target/a.png", caption="make it red")
    photo("source/a.png")
    (sample,) = edits(tmp_path)
    assert list(files(sample, tmp_path).items()) == [("target", "target/a.png"), ("source", "source/a.png")]
    assert (sample.id, sample.caption) == ("a.png", "make it red")


def test_results_in_target_are_the_pictures_where_none_lie_beside_it(photo, tmp_path):
    photo("target/a.png", caption="make it red")
    photo("source/a.png")
    (sample,) = read(Config(root=str(tmp_path)), ("image",), ("source",))
    assert files(sample, tmp_path) == {"image": "target/a.png", "source": "source/a.png"}
    assert sample.caption == "make it red"


def test_the_first_and_the_last_frame_of_a_clip_are_a_pair(photo, tmp_path):
    shades = [Image.new("RGB", (16, 16), (shade,) * 3) for shade in (0, 100, 200)]
    shades[0].save(tmp_path / "a.png", save_all=True, append_images=shades[1:])
    (tmp_path / "a.txt").write_text("make it bright")
    config = Config(root=str(tmp_path), frame_pairs=True)
    (sample,) = read(config, ("image",), ("source",))
    shown = {name: source.open().getpixel((3, 3))[0] for name, source in sample.sources.items()}
    assert shown == {"image": 200, "source": 0} and sample.caption == "make it bright"
    preflight([sample])
    with pytest.raises(UserError, match="makes a column 'source', which the objective does not read"):
        read(config)
    photo("b.png", caption="x")
    with pytest.raises(UserError, match=r"b\.png has no two frames, of which data\.frame_pairs would make a pair"):
        read(config, ("image",), ("source",))


def test_keys_of_metadata_are_columns(photo, tmp_path):
    photo("a.png")
    photo("masks/1.png")
    write = (tmp_path / "metadata.jsonl").write_text
    write(json.dumps({"file_name": "a.png", "text": "x", "mask_file": "masks/1.png", "width": 32, "tag": "a.b"}))
    (sample,) = masked(tmp_path, columns={"mask": "mask_file"})
    assert sample.sources["mask"].file == tmp_path / "masks/1.png"
    write(json.dumps({"input": "a.png", "text": "x", "mask": "masks/1.png"}))
    (sample,) = masked(tmp_path, columns={"image": "input"})
    assert sample.sources["image"].file == tmp_path / "a.png"


def test_a_csv_of_captions_and_columns(photo, tmp_path):
    for name in ("a.png", "b.png", "mask/a.png", "mask/b.png"):
        photo(name)
    table = tmp_path / "metadata.csv"
    table.write_text('\ufefffile_name,text,mask\r\na.png,"one, two",mask/b.png\r\nb.png,,mask/a.png\r\n', "utf-8")
    one, two = masked(tmp_path, prompt="any")
    assert (one.caption, two.caption) == ("one, two", "any")
    assert one.sources["mask"].file == tmp_path / "mask/b.png"
    table.write_text("file_name,text\na.png,one, two\n")
    with pytest.raises(UserError, match=r"metadata\.csv line 2 has more cells than the first line"):
        masked(tmp_path, ignore="mask")
    table.write_text('file_name,text\na.png,"one\n')
    with pytest.raises(UserError, match=r"metadata\.csv line 2 is not CSV"):
        masked(tmp_path, ignore="mask")
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match=r"has metadata\.jsonl and metadata\.csv: keep one"):
        masked(tmp_path)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A folder with a parquet file of two columns of pictures, ``image`` and ``alpha``."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def png(level: int) -> dict:
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (level,) * 3).save(buffer, "png")
        return {"bytes": buffer.getvalue(), "path": None}

    columns = {"image": [png(9)] * 2, "alpha": [png(1), png(200)], "text": ["x", "y"], "score": [0.5, 2.0]}
    (tmp_path / "parquet").mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "parquet/t.parquet"))
    return tmp_path / "parquet"


def test_columns_of_a_table(table):
    samples = masked(table, columns={"mask": "alpha"})
    assert [s.sources["mask"].open().getpixel((0, 0)) for s in samples] == [255, 200]
    with pytest.raises(UserError, match=r"pictures that nothing reads here, in alpha: .*data\.ignore=\[alpha\]"):
        masked(table)
    assert masked(table, ignore="all")[0].sources.keys() == {"image"}
    with pytest.raises(UserError, match=r"no column 'mask' .*: set data\.columns\.mask"):
        read(Config(root=str(table)), ("image", "mask"))
    assert [s.weight for s in masked(table, ignore="all", weight_column="score")] == [0.5, 2]
    with pytest.raises(UserError, match=r"no column 'much' .*: set data\.weight_column"):
        masked(table, ignore="all", weight_column="much")
    with pytest.raises(UserError, match="is a table: write it out as one"):
        read(Config(root=str(table)), ("image", "segments"))


# ---------------------------------------------------------------------------------------------------- claims


def test_a_column_that_nothing_claims_stops_the_run_until_it_is_ignored(photo, tmp_path):
    for name in ("a.png", "mask/a.png", "source/a.png"):
        photo(name)
    with pytest.raises(UserError) as caught:
        read(Config(root=str(tmp_path)))
    assert str(caught.value) == (
        f"{tmp_path} holds what nothing reads here: mask/ (1 file), source/ (1 file); an objective that needs mask or "
        "source would read such pictures; move it away, or go on without it by data.ignore=[mask,source]"
    )
    for ignore in (["mask", "source"], ["mask/", "s*"], "all"):
        (sample,) = read(Config(root=str(tmp_path), ignore=ignore))
        assert sample.sources.keys() == {"image"}
    (sample,) = masked(tmp_path, ignore=["mask", "source"])
    assert sample.sources.keys() == {"image"}


def test_a_key_of_pictures_that_nothing_claims_stops_the_run(photo, tmp_path):
    photo("a.png")
    photo("b.png")
    row = {"file_name": "a.png", "text": "x", "depth": "b.png", "author": "me", "n": 3}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"'depth' in metadata\.jsonl; move it away.*data\.ignore=\[depth\]"):
        masked(tmp_path)
    assert [s.id for s in masked(tmp_path, ignore=["depth"])] == ["a.png"]


def test_a_mapping_for_a_column_that_nothing_claims_is_refused(photo, tmp_path):
    photo("a.png")
    with pytest.raises(UserError, match=r"data\.columns\.depth is of no use: the objective reads image, mask"):
        masked(tmp_path, columns={"depth": "z"})


@pytest.mark.parametrize(("old", "new"), [("image_column", "image"), ("rejected_column", "rejected")])
def test_options_of_another_name_are_refused_with_the_new_one(old, new):
    with pytest.raises(UserError, match=rf"data\.{old} is now data\.columns\.{new}"):
        from_mapping(Config, {"root": "x", old: "y"}, "data")


def test_a_needed_column_that_is_not_there_is_refused(photo, tmp_path):
    photo("a.png", caption="x")
    with pytest.raises(UserError, match=r"no 'mask' pictures: put them into the subfolder mask.*'mask' in metadata"):
        read(Config(root=str(tmp_path)), ("image", "mask"))
    with pytest.raises(UserError, match="pocket/bumble has no 'mask' pictures"):
        read(Config(root="pocket/bumble"), ("image", "mask"))


# ---------------------------------------------------------------------------------------------------- halves


def test_half_a_sample_is_refused_by_name(photo, tmp_path):
    for name in ("a.png", "b.png"):
        photo(name, caption="x")
    for name in ("b.png", "c.png"):
        photo(f"mask/{name}")
    with pytest.raises(UserError, match=r"^2 samples that lack .*: a\.png \(mask\), mask/c\.png \(image\)$"):
        preflight(masked(tmp_path))
    photo("mask/b.webp")
    with pytest.raises(UserError, match=r"mask has b\.png and b\.webp for one picture"):
        masked(tmp_path)


def test_a_mask_must_have_the_shape_of_its_picture(photo, tmp_path):
    shapes = {"same": (60, 40), "half": (30, 20), "rounded": (19, 13), "double": (120, 80)}
    for name, shape in {**shapes, "other": (40, 60), "cut": (60, 37)}.items():
        photo(f"{name}.png", size=(60, 40), caption="x")
        photo(f"mask/{name}.png", size=shape)
    with pytest.raises(UserError, match=r"^2 masks or sources of another shape .*: cut\.png, other\.png$"):
        preflight(masked(tmp_path))
    (tmp_path / "mask/same.png").write_text("none")
    with pytest.raises(UserError, match=r"1 unreadable images .*: same\.png \(mask\); 2 masks"):
        preflight(masked(tmp_path))


# ---------------------------------------------------------------------------------------------------- left out


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("b.json", "b.json"),
        ("b.heic", "b.heic"),
        ("more/b.png", "more/ (1 file)"),
        ("data/train/t.parquet", "data/ (1 file)"),
        ("clip.mp4", "clip.mp4"),
        ("mask/notes.json", "mask/notes.json"),
    ],
)
def test_whatever_else_lies_there_stops_the_run_and_can_be_ignored(photo, tmp_path, name, shown):
    photo("a.png", caption="x")
    photo("mask/a.png")
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"something")
    with pytest.raises(UserError, match="holds what nothing reads here") as caught:
        masked(tmp_path)
    assert f": {shown}; move" in str(caught.value) and "\n" not in str(caught.value)
    named = str(caught.value).split("data.ignore=")[1].strip("[]").split(",")
    for ignore in (named, "all"):
        assert [s.id for s in masked(tmp_path, ignore=ignore)] == ["a.png"]


def test_links_to_nothing_and_to_folders_are_named(photo, tmp_path):
    photo("set/a.png", caption="x")
    photo("elsewhere/a.png")
    os.symlink(tmp_path / "gone.png", tmp_path / "set/b.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set/more")
    with pytest.raises(UserError, match=r"b\.png \(a link to nothing\)") as caught:
        read(Config(root=str(tmp_path / "set")))
    assert "more/ (a link to a folder)" in str(caught.value)
    os.symlink(tmp_path / "elsewhere", tmp_path / "set/mask")
    (sample,) = masked(tmp_path / "set", ignore=["b.png", "more"])
    assert sample.sources["mask"].file == tmp_path / "set/mask/a.png"


def test_what_holds_no_data_is_passed_over(photo, tmp_path):
    photo("a.png", caption="x")
    for name in ("README.md", "LICENSE", "Thumbs.db", "desktop.ini", ".DS_Store", "._a.png", ".git/x", "__MACOSX/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"something")
    assert [s.id for s in read(Config(root=str(tmp_path)))] == ["a.png"]


def test_an_ignored_picture_is_left_out_with_its_caption(photo, tmp_path):
    photo("a.png", caption="x")
    photo("b.png", caption="y")
    assert [s.id for s in read(Config(root=str(tmp_path), ignore=["b.*"]))] == ["a.png"]


def test_beside_tables_nothing_else_may_lie(table, photo):
    assert len(read(Config(root=str(table), ignore="alpha"))) == 2
    photo("parquet/more/a.png")
    with pytest.raises(UserError, match=r"nothing reads here: more/ \(1 file\)"):
        read(Config(root=str(table), ignore="alpha"))


def test_captions_that_metadata_replaces_are_named(photo, tmp_path):
    photo("a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}))
    (tmp_path / "b.txt").write_text("of no picture")
    with pytest.raises(UserError, match=r"nothing reads here: b\.txt"):
        read(Config(root=str(tmp_path)))


def test_caption_files_have_either_ending_in_any_case(photo, tmp_path):
    for name, ending in (("a", ".caption"), ("b", ".TXT"), ("c", ".txt")):
        photo(f"{name}.png").with_suffix(ending).write_bytes(f"\ufeffthe  {name}\r\n".encode())
    assert [s.caption for s in read(Config(root=str(tmp_path)))] == ["the a", "the b", "the c"]
    (tmp_path / "c.caption").write_text("again")
    with pytest.raises(UserError, match=r"captions in c\.caption and c\.txt: keep one"):
        read(Config(root=str(tmp_path)))


# ---------------------------------------------------------------------------------------------------- rows


@pytest.fixture
def samples(photo) -> list[Sample]:
    """Two pictures whose masks are the pictures themselves, and a prior one without a mask."""

    def sources(name: str) -> dict[str, Source]:
        path = photo(name, size=(48, 40))
        return {"image": Source(path), "mask": Source(path, "mask")}

    made = [Sample(id=n, sources=sources(f"{n}.png"), caption=n) for n in ("a", "b")]
    return [*made, Sample(id="p", sources={"image": Source(photo("p.png"))}, caption="p", prior=True)]


def rows_of(model, samples, tmp_path, **options) -> Rows:
    return Rows(model, samples, Config(root="x", **options), tmp_path / "cache")


@pytest.mark.parametrize("cache", [True, False])
def test_a_mask_follows_the_size_and_flip_of_its_picture(model, samples, tmp_path, cache):
    picks = [Pick(index=1, size=(32, 64), flip=True), Pick(index=0, size=(32, 64)), Pick(index=2, size=(32, 64))]
    for _ in range(2):  # made, then read back
        mask = rows_of(model, samples, tmp_path, cache=cache).collate(picks).data["mask"]
        assert mask.shape == (3, 1, 16, 32) and mask.dtype == torch.float32
        for row, (index, flip) in enumerate(((1, True), (0, False))):
            picture = samples[index].sources["mask"].open()
            assert torch.equal(mask[row], to_mask(picture, (32, 64), 2, flip=flip))
        assert (mask[2] == 1).all()


def test_a_random_crop_is_that_of_the_picture(model, samples, tmp_path):
    rows = rows_of(model, samples, tmp_path, crop="random", cache=False)
    masks = [rows.mask(Pick(index=0, size=(16, 48), seed=seed)) for seed in (1, 2)]
    x, y = torch.rand(2, generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(masks[0], to_mask(samples[0].sources["mask"].open(), (16, 48), 2, centering=(x, y)))
    assert not torch.equal(*masks)
    pixels = to_pixels(samples[0].sources["image"].open(), (16, 48), centering=(x, y))
    assert torch.equal(rows.moments(Pick(index=0, size=(16, 48), seed=1)), model.moments(pixels[None])[0])


def test_masks_are_made_once_and_again_when_they_change(model, samples, tmp_path, photo, monkeypatch):
    made = []
    monkeypatch.setattr("visiontune.data.transforms.to_mask", lambda *a, **k: made.append(1) or to_mask(*a, **k))
    separate = Source(photo("mask/a.png", size=(48, 40)), "mask")
    changing = [Sample(id="a", sources={**samples[0].sources, "mask": separate}, caption="x")]
    for _ in range(2):
        rows = rows_of(model, changing, tmp_path)
        rows.fill()
        before = rows.collate([Pick(index=0, size=SQUARE)]).data["mask"]
        assert len(made) == 1 and model.encoded == 1
    photo("mask/a.png", size=(48, 40), seed=9)
    after = rows_of(model, changing, tmp_path).collate([Pick(index=0, size=SQUARE)]).data["mask"]
    assert len(made) == 2 and model.encoded == 1 and not torch.equal(before, after)


def test_any_column_of_pictures_becomes_latents(model, photo, tmp_path):
    sources = {name: Source(photo(f"{name}.png")) for name in ("target", "source", "sketch")}
    rows = rows_of(model, [Sample(id="a", sources=sources, caption="x")], tmp_path)
    data = rows.collate([Pick(index=0, size=SQUARE, seed=3)]).data
    assert list(data) == ["target", "source", "sketch"]
    eps = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    for name, latents in data.items():
        moments = model.moments(to_pixels(sources[name].open(), SQUARE)[None])
        # What is edited is the mean, as where a model draws.
        drawn = None if name == "source" else eps
        torch.testing.assert_close(latents, model.latents_from_moments(moments, drawn))


def test_the_first_column_decides_the_bucket(model, photo, tmp_path):
    model.resolution = 512
    sources = {"target": Source(photo("a.png", size=(60, 40))), "source": Source(photo("b.png", size=(40, 60)))}
    ((height, width),) = rows_of(model, [Sample(id="a", sources=sources, caption="x")], tmp_path).buckets
    assert width > height


def test_latents_may_have_frames(model, photo, tmp_path):
    """A model of latents [b, c, f, h, w] is cached and collated as any other."""
    flat = model.moments

    def moments(pixels):
        return torch.stack([flat(pixels), flat(pixels) * 0.5], 2)

    model.moments = moments
    samples = [Sample(id=n, sources={"image": Source(photo(f"{n}.png"))}, caption=n) for n in ("a", "b")]
    batches = [BatchSampler(rows_of(model, samples, tmp_path), 2).batch(0).data["image"] for _ in range(2)]
    assert batches[0].shape == (2, 3, 2, 16, 16) and torch.equal(*batches) and model.encoded == 4
    picks = [Pick(index=i, size=SQUARE, seed=7 + i) for i in range(2)]
    latents = rows_of(model, samples, tmp_path).collate(picks).data["image"]
    for i, pick in enumerate(picks):
        eps = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(pick.seed))
        pixels = to_pixels(samples[i].sources["image"].open(), SQUARE)[None]
        torch.testing.assert_close(latents[i], model.latents_from_moments(moments(pixels), eps[None])[0])
