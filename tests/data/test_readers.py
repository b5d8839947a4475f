from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from visiontune.data.base import Config, Sample, substitute
from visiontune.data.readers import read, resolve
from visiontune.errors import UserError
from visiontune.schema import from_mapping


def captions(samples: list[Sample]) -> dict[str, str]:
    return {s.id: s.caption for s in samples}


def write_metadata(folder, *rows) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------------- folders


def test_a_flat_folder_pairs_images_with_text_files(photo, tmp_path):
    photo("b.JPG", caption="a [trigger] [class]\n on the  moon\n")
    photo("a.png", caption="\ufeffa cat")
    photo(".hidden.png", caption="no")
    (tmp_path / "notes.md").write_text("no")
    samples = read(Config(root=str(tmp_path), trigger="zwx", class_noun="dog"))
    assert captions(samples) == {"a.png": "a cat", "b.JPG": "a zwx dog on the moon"}
    assert [s.id for s in samples] == ["a.png", "b.JPG"]
    assert samples[0].sources["image"].file == tmp_path / "a.png"
    assert not samples[0].prior and samples[0].weight == 1.0


def test_the_prompt_captions_images_without_a_caption_but_not_those_with_an_empty_one(photo, tmp_path):
    photo("a.png")
    photo("b.png", caption="")
    photo("c.png", caption="its own")
    config = Config(root=str(tmp_path), prompt="a photo of a [trigger] [class]", class_noun="dog")
    assert captions(read(config)) == {"a.png": "a photo of a sks dog", "b.png": "", "c.png": "its own"}


def test_metadata_captions_files_in_subfolders_and_its_column_can_be_named(photo, tmp_path):
    photo("images/a.png")
    photo("b.png")
    write_metadata(
        tmp_path, {"file_name": "./images/a.png", "words": "a cat"}, "", {"file_name": "b.png", "words": None}
    )
    config = Config(root=str(tmp_path), caption_column="words", prompt="a thing")
    samples = read(config)
    assert captions(samples) == {"b.png": "a thing", "images/a.png": "a cat"}
    assert samples[1].sources["image"].file == tmp_path / "images/a.png"


def test_an_image_that_metadata_leaves_out_has_the_empty_caption(photo, tmp_path):
    photo("a.png")
    photo("b.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "a cat"})
    assert captions(read(Config(root=str(tmp_path)))) == {"a.png": "a cat", "b.png": ""}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", "line 2 is not JSON"),
        ({"text": "x"}, "line 2 has no file_name"),
        ({"file_name": "b.png", "txt": "x"}, r"line 2 has no 'text'; did you mean 'txt'\?"),
        ({"file_name": "b.png", "text": ["x"]}, "line 2 is list, not text"),
        ({"file_name": "a.png", "text": "again"}, "line 2 captions a.png a second time"),
    ],
)
def test_bad_metadata_is_refused_with_its_line(photo, tmp_path, row, message):
    photo("a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "x"}, row)
    with pytest.raises(UserError, match=message):
        read(Config(root=str(tmp_path)))


def test_two_kinds_of_captions_in_one_folder_are_refused(photo, tmp_path):
    photo("a.png", caption="x")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "y"})
    with pytest.raises(UserError, match=r"metadata\.jsonl and also \.txt captions for a\.png"):
        read(Config(root=str(tmp_path)))


def test_a_parent_folder_points_to_the_folder_with_the_images(photo, tmp_path):
    photo("holiday/a.png", caption="x")
    with pytest.raises(UserError, match=r"no images in .*there are images in .*holiday: set data\.root"):
        read(Config(root=str(tmp_path)))


def test_a_caption_that_is_not_utf8_is_refused_by_name(photo, tmp_path):
    photo("a.png").with_suffix(".txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt' is not UTF-8"):
        read(Config(root=str(tmp_path)))


# ---------------------------------------------------------------------------------------------------- words


def test_substitution_replaces_every_mark_in_any_case():
    assert substitute("[Trigger], a [class] like [trigger]", "zwx", "dog") == "zwx, a dog like zwx"
    assert substitute("[other] [trigger]", r"\1", None) == r"[other] \1"


def test_a_class_mark_without_a_class_noun_is_refused():
    with pytest.raises(UserError, match=r"data\.class_noun"):
        substitute("a [class]", "sks", None)


# ---------------------------------------------------------------------------------------------------- tables


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """A parquet file as users have them: encoded bytes under ``picture``, and captions of which one is null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    pictures = [{"bytes": png(i), "path": None} for i in range(3)]
    path = tmp_path / "data" / "pets.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"picture": pictures, "text": ["a cat", "a [trigger] dog", None]}), path)
    return path


def test_a_parquet_file_gives_pictures_and_captions(parquet):
    samples = read(Config(root=str(parquet), columns={"image": "picture"}, prompt="a pet"))
    assert [s.caption for s in samples] == ["a cat", "a sks dog", "a pet"]
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(
            np.asarray(sample.sources["image"].open()), np.asarray(Image.open(io.BytesIO(png(i))))
        )
    assert len({s.sources["image"].digest() for s in samples}) == 3


def test_a_parquet_file_names_pictures_of_its_own_folder(tmp_path, parquet, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)  # names count from the table, not from the working folder
    for file in (tmp_path / "secret.png", parquet.parent / "a.png", parquet.parent / "b.png"):
        file.write_bytes(png(7))
    outside = [str(tmp_path / "secret.png"), "../secret.png", "http://127.0.0.1:9/a.png"]
    names = ["a.png", str(parquet.parent / "b.png"), *outside]
    cells = [{"bytes": None, "path": name} for name in names]
    pq.write_table(pa.table({"image": cells, "text": ["a"] * len(names)}), parquet)
    first, second, *others = read(Config(root=str(parquet)))
    for sample in (first, second):
        np.testing.assert_array_equal(np.asarray(sample.sources["image"].open()), Image.open(io.BytesIO(png(7))))
    for row, sample in enumerate(others[:2], 2):
        with pytest.raises(UserError, match=f"row {row} of .* which is outside of"):
            sample.sources["image"].open()
    with pytest.raises(FileNotFoundError):  # no server is asked
        others[2].sources["image"].open()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "mask/../../secret.png"])
def test_a_table_of_metadata_names_pictures_of_its_own_folder(tmp_path, name):
    folder = tmp_path / "photos"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(0))
    (folder / "a.png").write_bytes(png(1))
    for line in ({"file_name": name, "text": "a"}, {"file_name": "a.png", "mask": name, "text": "a"}):
        (folder / "metadata.jsonl").write_text(json.dumps(line))
        with pytest.raises(UserError, match=r"metadata.jsonl line 1 names .* which is outside of"):
            read(Config(root=str(folder)), ("image",), ("mask",))


def test_a_folder_of_parquet_files_is_a_dataset(parquet):
    assert len(read(Config(root=str(parquet.parent), columns={"image": "picture"}))) == 3


def test_wrong_columns_are_refused_with_those_there_are(parquet):
    with pytest.raises(UserError, match=r"no column 'image' \(it has picture, text\): set data\.columns\.image"):
        read(Config(root=str(parquet)))
    with pytest.raises(UserError, match=r"no column 'words' .* data\.caption_column, or data\.prompt"):
        read(Config(root=str(parquet), columns={"image": "picture"}, caption_column="words"))
    with pytest.raises(UserError, match="is dict, not text"):
        read(Config(root=str(parquet), columns={"image": "text"}, caption_column="picture"))


def test_one_prompt_can_caption_a_table_without_captions(parquet):
    config = Config(root=str(parquet), columns={"image": "picture"}, caption_column="words", prompt="a [trigger]")
    assert {s.caption for s in read(config)} == {"a sks"}


def test_a_hub_dataset_is_loaded_by_its_id_split_and_revision(monkeypatch):
    import datasets

    asked = []
    picture = Image.new("RGB", (4, 4), "red")

    def load(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_dict({"image": [picture], "text": ["a cat"]}).cast_column(
            "image", datasets.Image()
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    (sample,) = read(Config(root="someone/pets", split="test", revision="v1"))
    assert asked == [("someone/pets", {"split": "test", "revision": "v1"})]
    assert sample.caption == "a cat" and sample.sources["image"].open().getpixel((0, 0)) == (255, 0, 0)


def test_a_hub_dataset_that_cannot_be_reached_is_one_readable_line(monkeypatch):
    import datasets

    def load(*args, **kwargs):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"cannot load dataset someone/pets .*no network.*give its folder") as caught:
        read(Config(root="someone/pets"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("root", ["pocket/bumbel", "./nothing/here", "/nothing/here.parquet", "nothing", "a/b/c"])
def test_what_is_no_dataset_is_refused_without_asking_the_hub(root, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="does not exist, nor is it a catalogue dataset"):
        read(Config(root=root))


def test_a_misspelt_catalogue_name_gets_the_nearest():
    with pytest.raises(UserError, match="did you mean 'pocket/bumble'"):
        read(Config(root="pocket/bumbel"))


# ---------------------------------------------------------------------------------------------------- catalogue


def test_a_catalogue_dataset_brings_its_own_words_and_the_recipe_may_replace_them():
    samples = read(Config(root="pocket/bumble"))
    assert {s.caption for s in samples} == {"a photo of a sks circle"}
    other = read(Config(root="pocket/bumble", trigger="zwx", class_noun="ball", prompt="[trigger] the [class]"))
    assert {s.caption for s in other} == {"zwx the ball"}
    assert [s.sources["image"].digest() for s in other] == [s.sources["image"].digest() for s in samples]


def test_resolve_makes_a_catalogue_datasets_words_part_of_the_recipe():
    resolved = resolve(Config(root="pocket/bumble", resolution=32))
    assert (resolved.class_noun, resolved.trigger, resolved.resolution) == ("circle", "sks", 32)
    assert resolve(resolved) == resolved
    assert resolve(Config(root="someone/pets")) == Config(root="someone/pets", class_noun="object")
    assert resolve(Config(root="someone/pets", class_noun="cat")).class_noun == "cat"


def test_a_catalogue_entry_can_stand_for_a_hub_dataset(monkeypatch):
    import datasets
    from visiontune import catalogue

    spec = {
        "source": "someone/pets",
        "revision": "abc",
        "columns": {"image": "photo"},
        "split": "all",
        "class_noun": "pet",
    }
    monkeypatch.setattr(catalogue, "names", lambda kind: ["pets"])
    monkeypatch.setattr(catalogue, "load", lambda kind, name: spec)
    table = datasets.Dataset.from_dict({"photo": [Image.new("RGB", (4, 4))], "text": ["a [class]"]})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: asked.append((path, options)) or table)
    (sample,) = read(Config(root="pets"))
    assert asked == [("someone/pets", {"split": "all", "revision": "abc"})]
    assert sample.caption == "a pet"
    with pytest.raises(UserError, match=r"no column 'sketch' \(it has photo, text\): set data\.columns\.image"):
        read(Config(root="pets", columns={"image": "sketch"}))


def test_a_misspelt_option_of_a_catalogue_entry_is_refused(monkeypatch):
    from visiontune import catalogue

    monkeypatch.setattr(catalogue, "names", lambda kind: ["pets"])
    monkeypatch.setattr(catalogue, "load", lambda kind, name: {"source": "someone/pets", "colums": {"image": "photo"}})
    with pytest.raises(UserError, match=r"colums is not an option .*did you mean 'columns'"):
        read(Config(root="pets"))


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [({"caption_dropout": 1.5}, "caption_dropout"), ({"crop": "random"}, r"data\.cache=false")],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        from_mapping(Config, {"root": "x", **options})
