"""Several subjects in one run: their pictures, words and classes, and what is kept of each."""

from __future__ import annotations

import pytest
from PIL import Image
from tiny import tiny_model

from visiontune import config
from visiontune.data.base import Config, Subject
from visiontune.data.inventory import inventory
from visiontune.data.prompts import read_data_prompts
from visiontune.data.readers import read, resolve
from visiontune.errors import UserError
from visiontune.models.words import rows_of_each
from visiontune.objectives import _prior, dreambooth


def told(*subjects: Subject, **options) -> Config:
    return Config(root="pocket/bumble", subjects=list(subjects), **options)


def test_every_subject_has_its_own_word_class_and_pictures():
    found = resolve(told(Subject(root="pocket/domino", trigger="zwx"), Subject(root="pocket/ember", trigger="qrv")))
    assert [(one.trigger, one.class_noun) for one in found.each()] == [
        ("sks", "circle"), ("zwx", "square"), ("qrv", "heart"),
    ]  # fmt: skip
    samples = read(found)
    assert len(samples) == 15 and len({sample.id for sample in samples}) == 15
    assert {sample.caption for sample in samples} == {
        "a photo of a sks circle", "a photo of a zwx square", "a photo of a qrv heart",
    }  # fmt: skip
    assert samples[5].id.startswith("zwx/")
    alone = read(Config(root="pocket/domino", trigger="zwx"))
    assert [s.sources["image"].digest() for s in samples[5:10]] == [s.sources["image"].digest() for s in alone]


def test_folders_are_subjects_too_and_what_is_left_out_is_said_of_each(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "0.png")
    (tmp_path / "dog" / "notes.csv").write_text("x")
    data = Config(
        root=str(tmp_path / "cat"),
        class_noun="cat",
        prompt="a photo of a [trigger] [class]",
        ignore=["notes.csv"],
        subjects=[Subject(root=str(tmp_path / "dog"), trigger="zwx", class_noun="dog")],
    )
    assert [sample.caption for sample in read(resolve(data))] == ["a photo of a sks cat", "a photo of a zwx dog"]
    assert "ignored: zwx: notes.csv" in inventory(read(resolve(data)), resolve(data))


def test_two_subjects_under_one_word_are_refused():
    with pytest.raises(UserError, match=r"data\.subjects\[0\] goes by 'sks'"):
        resolve(told(Subject(root="pocket/domino")))
    with pytest.raises(UserError, match=r"data\.subjects\[0\] goes by 'ZWX'"):
        resolve(told(Subject(root="pocket/domino", trigger="ZWX"), Subject(root="pocket/ember", trigger="zwx")))
    with pytest.raises(UserError, match="leave them out"):
        read_data_prompts(told(Subject(root="pocket/domino", trigger="zwx")))


def test_recipes_name_subjects_in_short():
    run = config.load_run("compose/subjects")
    assert [one.trigger for one in run.data.each()] == ["sks", "zwx"]
    run = config.load_run("compose/subjects", ["data.subjects=[{root: pocket/ember, trigger: vlp}]"])
    assert run.data.subjects[0].class_noun == "heart"


def test_what_is_kept_is_about_every_class_and_names_none_of_the_words():
    data = resolve(told(Subject(root="pocket/domino", trigger="zwx")))
    given = dreambooth.Config(prior_prompts=["a red [class]", "a star"], prior_images=9)
    assert _prior.prompts(given, data, "pocket/sd") == ["a red circle", "a red square", "a star"]
    with pytest.raises(UserError, match="'a zwx square' with the trigger"):
        _prior.prompts(dreambooth.Config(prior_prompts=["a zwx square"]), data, "pocket/sd")
    samples = read(data)
    assert {sample.caption for sample in _prior.own(samples, data)} == {"a photo of a circle", "a photo of a square"}


def test_words_of_several_subjects_are_trained_beside_each_other():
    model = tiny_model()
    found = rows_of_each(model, {"red": "circle", "blue": "square"})
    for name, (_, words, kept) in found.items():
        assert name.startswith("text_encoder.") and list(words) == ["red", "blue"] and len(kept) >= 2
    with pytest.raises(UserError, match="share its meaning"):
        rows_of_each(model, {"red": "circle", "red star": "star"})
