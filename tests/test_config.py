from __future__ import annotations

import dataclasses

import pytest

from visiontune import config
from visiontune.errors import UserError

MINIMAL = {"name": "a", "adapter": "lora", "data": "photos"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=200", {"train": {"steps": "200"}}),
        ("adapter=oft", {"adapter": "oft"}),
        ("adapter.block_size=16", {"adapter": {"name": "lora", "block_size": "16"}}),
        ("adapter.targets=[to_q, to_k]", {"adapter": {"name": "lora", "targets": ["to_q", "to_k"]}}),
        ("data.root=my_photos", {"data": {"root": "my_photos"}}),
        ("data.flip=true", {"data": {"root": "photos", "flip": True}}),
        ("model.revision=1e5", {"model": {"revision": "1e5"}}),
        ("train.ema=null", {"train": {"ema": None}}),
        ("data.prompt=a cat: asleep", {"data": {"root": "photos", "prompt": "a cat: asleep"}}),
        ("data.prompt=[trigger] asleep", {"data": {"root": "photos", "prompt": "[trigger] asleep"}}),
        ("train.optimizer_options={eps: 1.0e-6}", {"train": {"optimizer_options": {"eps": 1e-6}}}),
        ("name='a=b'", {"name": "a=b"}),
        ("description=", {"description": None}),
    ],
)
def test_overrides(override, expected):
    assert config.apply(MINIMAL, [override]) == {**MINIMAL, **expected}


def test_overrides_do_not_change_their_input():
    content = {"train": {"steps": 1}}
    assert config.apply(content, ["train.steps=2", "train.lr=1"]) == {"train": {"steps": "2", "lr": "1"}}
    assert content == {"train": {"steps": 1}}


@pytest.mark.parametrize("override", ["train.steps", "=3", ".steps=3", "train..steps=3"])
def test_malformed_overrides_are_refused(override):
    with pytest.raises(UserError, match="not an override"):
        config.apply({}, [override])


def test_a_recipe_becomes_typed_and_every_option_is_spelt_out():
    run = config.parse_run({**MINIMAL, "train": {"lr": "1e-3"}, "adapter": {"name": "lora", "rank": "2"}})
    assert run.train.lr == 1e-3 and run.data.root == "photos"
    assert run.adapter["rank"] == 2 and run.adapter["targets"] == "attention"
    assert run.objective["name"] == "denoising" and "snr_gamma" in run.objective
    assert str(run.folder) == "runs/a"


@pytest.mark.parametrize("adapter", [None, "none", {"name": "none"}])
def test_no_adapter_means_full_fine_tuning(adapter):
    run = config.parse_run({**MINIMAL, "adapter": adapter})
    assert run.adapter is None and run.resolved()["adapter"] == "none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"adapter": {"name": "lora", "rank": "wide"}},
            "adapter.rank must be a whole number from 1",
        ),
        ({"adapter": {"name": "lora", "targets": {"a": 1}}}, "adapter.targets must be a preset"),
        ({"adapter": {"rank": 2}}, "adapter.name is missing"),
        ({"adapter": 5}, "adapter must be a mapping"),
        ({"objective": {"name": "denoising", "gamma": 1}}, "objective.gamma is not an option of denoising"),
        ({"data": {"root": "photos", "caption_dropout": 2}}, "data"),
        ({"model": {"source": "a", "dtype": "fp64"}}, "model.dtype cannot be 'fp64'"),
        ({"preview": {"every": 0}}, "preview.every must be a whole number from 1"),
        ({"name": ""}, "name ''"),
        ({"name": "/tmp/a"}, "name '/tmp/a'"),
    ],
)
def test_errors_have_the_path(change, message):
    with pytest.raises(UserError) as error:
        config.parse_run({**MINIMAL, **change})
    assert str(error.value).startswith(message)


def test_what_a_recipe_must_have():
    for name in MINIMAL:
        with pytest.raises(UserError, match=f"{name} is missing"):
            config.parse_run({k: v for k, v in MINIMAL.items() if k != name})


def test_a_catalogue_dataset_brings_its_words_into_the_run():
    run = config.parse_run({**MINIMAL, "data": "pocket/bumble"})
    assert run.data.class_noun == "circle" and run.data.prompt == "a photo of a [trigger] [class]"


def test_a_recipe_is_found_by_name_or_by_path(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nadapter: lora\ndata: photos\n")
    assert config.load_run(file).name == config.load_run(str(file)).name == "mine"
    assert config.load_run("personalise/lora", ["name=other"]).name == "other"
    sample = config.load_sample("sample/prompts", ["seeds=2", "prompts=a cat"])
    assert sample.seed_list() == [0, 1] and sample.prompts == "a cat"


def test_runs_are_values():
    run = config.parse_run(MINIMAL)
    assert run == config.parse_run(MINIMAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.name = "b"
