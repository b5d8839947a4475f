"""Folders whose subfolders say how often a picture comes, and what it shows."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from visiontune.data.base import Config
from visiontune.data.inventory import inventory
from visiontune.data.preflight import preflight
from visiontune.data.readers import read
from visiontune.errors import UserError


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(path)


@pytest.fixture
def root(tmp_path):
    picture(tmp_path / "3_sks dog" / "a.png")
    picture(tmp_path / "3_sks dog" / "b.png", 9)
    (tmp_path / "3_sks dog" / "b.txt").write_text("a sks dog asleep")
    picture(tmp_path / "1_cat" / "c.png", 20)
    return tmp_path


def captions(samples):
    return Counter((sample.id, sample.caption) for sample in samples)


def test_each_picture_comes_as_often_as_its_folder_says_under_its_words(root):
    samples = read(Config(root=str(root)))
    preflight(samples)
    wanted = {("3_sks dog/a.png", "sks dog"): 3, ("3_sks dog/b.png", "a sks dog asleep"): 3, ("1_cat/c.png", "cat"): 1}
    assert captions(samples) == wanted
    told = inventory(samples, Config(root=str(root)))
    assert any("3 from the name of 3_sks dog" in line and "1 from the name of 1_cat" in line for line in told)


def test_a_prompt_of_one_s_own_takes_the_place_of_the_words(root):
    samples = read(Config(root=str(root), prompt="a photo of a [class]", class_noun="pet"))
    assert captions(samples)["1_cat/c.png", "a photo of a pet"] == 1


@pytest.mark.parametrize("other", ["0_none/d.png", "more/d.png", "notes.csv"])
def test_what_else_lies_there_is_named(root, other):
    path = root / other
    picture(path) if path.suffix == ".png" else path.write_text("x")
    with pytest.raises(UserError, match=other.partition("/")[0]):
        read(Config(root=str(root)))
    assert len(read(Config(root=str(root), ignore=[other.partition("/")[0]]))) == 7


def test_a_part_can_be_ignored_and_pictures_above_are_read_alone(root):
    assert {s.id for s in read(Config(root=str(root), ignore=["3_sks dog"]))} == {"1_cat/c.png"}
    picture(root / "top.png")
    with pytest.raises(UserError, match="holds what nothing reads here: 1_cat"):
        read(Config(root=str(root)))
