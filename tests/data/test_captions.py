"""Captions beside pictures, whoever wrote them, and what is said of those that cannot be read."""

from __future__ import annotations

import json

import pytest

from visiontune.data.base import Config
from visiontune.data.inventory import inventory, uncaptioned
from visiontune.data.readers import read
from visiontune.errors import UserError


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ({"text": "a dog"}, {}),
        ({"caption": "a dog", "width": 64}, {}),
        ({"prompt": "a dog"}, {}),
        ({"text": "a dog", "caption": "another"}, {}),
        ({"caption": "a dog", "prompt": "a  dog"}, {"caption_column": "caption"}),
        ({"prompt": "a dog", "caption": "a dog"}, {}),
        ({"de": "a dog", "caption": "ein Hund"}, {"caption_column": "de"}),
    ],
)
def test_an_object_beside_a_picture_is_its_caption(photo, tmp_path, content, options):
    photo("a.png").with_suffix(".JSON").write_text(json.dumps(content), encoding="utf-8-sig")
    (sample,) = read(Config(root=str(tmp_path), **options))
    assert (sample.caption, sample.caption_from) == ("a dog", ".json files")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"tags": ["dog"]}', "no object with 'text' or 'caption' or 'prompt': name the key"),
        ('["a dog"]', "no object with"),
        ('{"caption": ["a", "dog"]}', r"the caption in .*a\.json is list, not text"),
        ('{"caption": "a", "prompt": "b"}', "caption and prompt, which differ"),
        ('{"caption": ', "is not JSON"),
        ('{"caption": "\\ud800"}', "half of a character"),
        ('{"caption": ' + "[" * 100_000, "nests too deep"),
        ('{"caption": "x", "n": ' + "1" * 5000 + "}", "too many digits"),
    ],
)
def test_an_object_that_is_no_caption_is_one_line(photo, tmp_path, content, message):
    photo("a.png").with_suffix(".json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read(Config(root=str(tmp_path)))
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


def test_an_object_without_a_picture_is_no_caption(photo, tmp_path):
    photo("a.png", caption="x")
    (tmp_path / "meta_cap.json").write_text(json.dumps({"a": {"caption": "y"}}))
    with pytest.raises(UserError, match=r"nothing reads here: meta_cap\.json"):
        read(Config(root=str(tmp_path)))


def test_of_two_captions_one_kind_may_be_left_out(photo, tmp_path):
    photo("a.png", caption="of the text").with_suffix(".json").write_text(json.dumps({"caption": "of the object"}))
    with pytest.raises(UserError, match=r"a\.json and a\.txt: keep one of them, or .* data\.ignore='\*\.json'"):
        read(Config(root=str(tmp_path)))
    assert read(Config(root=str(tmp_path), ignore="*.json"))[0].caption == "of the text"
    assert read(Config(root=str(tmp_path), ignore="*.txt"))[0].caption == "of the object"


@pytest.mark.parametrize("ending", [".txt", ".caption"])
def test_a_caption_of_two_bytes_a_character_is_refused(photo, tmp_path, ending):
    photo("a.png").with_suffix(ending).write_bytes("a dog".encode("utf-16-le"))
    with pytest.raises(UserError, match=rf"a\{ending}' has null characters"):
        read(Config(root=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", "", "has no lines"),
        ("metadata.csv", "file_name,text\n", "has no lines"),
        ("metadata.jsonl", "[" * 100_000, "line 1 nests too deep"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x", "n": %s}' % ("1" * 5000), "too many digits"),
        ("metadata.jsonl", '{"file_name": "%s.png", "text": "x"}' % ("a" * 300), "which no file can be called"),
        ("metadata.jsonl", r'{"file_name": "a\u0000.png", "text": "x"}', "which no file can be called"),
        ("metadata.jsonl", r'{"file_name": "\ud800.png", "text": "x"}', "half of a character"),
        ("metadata.csv", "file_name,text\na.png," + "x" * 200_000, "is not CSV"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(photo, tmp_path, name, content, message):
    photo("a.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read(Config(root=str(tmp_path), prompt="a default"))
    assert name in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("root", ["a" * 300, "a\0b", "~nobody-is-called-so/x", "\ud800"])
def test_a_root_that_nothing_can_be_called_is_one_line(root):
    with pytest.raises(UserError, match="cannot be a dataset") as caught:
        read(Config(root=root))
    str(caught.value).encode()


def test_what_is_used_is_told_by_columns_origins_and_what_is_ignored(photo, tmp_path):
    for name, caption in (("a.png", "a dog"), ("b.jpg", "a cat"), ("c.png", None)):
        photo(name, caption=caption)
        photo(f"mask/{name}")
    photo("b.jpg").with_suffix(".txt").rename(tmp_path / "b.caption")
    photo("old/x.png"), photo("old/y.png"), photo("d.png")
    (tmp_path / "notes.json").write_text("{}")
    config = Config(root=str(tmp_path), prompt="a [class]", class_noun="pet", ignore=["old", "*.json", "d.png", "none"])
    samples = read(config, ("image",), ("mask",))
    assert inventory(samples, config) == [
        "columns: image 3 (2 .png, 1 .jpg), mask 3 (2 .png, 1 .jpg)",
        "captions: 1 from .txt files, 1 from .caption files, 1 from data.prompt",
        "ignored: d.png, notes.json, old/ (2 files)",
    ]
    assert uncaptioned(samples) == ["1 of 3 pictures have no caption and get data.prompt: c.png"]
    assert uncaptioned(samples[:2]) == uncaptioned(samples[2:]) == []


def test_a_table_of_pictures_without_words_is_told(photo, tmp_path):
    photo("a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": None}))
    config = Config(root=str(tmp_path), prompt="a dog")
    samples = read(config)
    assert [s.caption for s in samples] == ["a dog"]
    assert inventory(samples, config)[1] == "captions: 1 from data.prompt, since metadata.jsonl has none"
    assert uncaptioned(samples) == ["1 of 1 pictures have no caption and get data.prompt: a.png"]


def test_everything_that_nothing_reads_is_told_where_all_is_ignored(photo, tmp_path):
    photo("a.png", caption="a dog"), photo("more/x.png")
    config = Config(root=str(tmp_path), ignore="all")
    assert inventory(read(config), config)[-1] == "ignored: more/ (1 file)"
