from __future__ import annotations

import dataclasses
import os

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
        ("adapter={name: oft, block_size: 16}", {"adapter": {"name": "oft", "block_size": 16}}),
        ("data.root=my_photos", {"data": {"root": "my_photos"}}),
        ("data.flip=true", {"data": {"root": "photos", "flip": "true"}}),
        ("model.revision=1e5", {"model": {"revision": "1e5"}}),
        ("train.ema=null", {"train": {"ema": None}}),
        ("data.prompt=a cat: asleep", {"data": {"root": "photos", "prompt": "a cat: asleep"}}),
        ("data.prompt=[trigger] asleep", {"data": {"root": "photos", "prompt": "[trigger] asleep"}}),
        ("name='a=b'", {"name": "a=b"}),
        ("description=", {"description": ""}),
    ],
)
def test_overrides(override, expected):
    assert config.apply(MINIMAL, [override]) == {**MINIMAL, **expected}


def test_bytes_that_are_no_text_are_refused():
    content = config.apply(MINIMAL, [f"data.prompt={os.fsdecode('café'.encode('latin-1'))}"])
    with pytest.raises(UserError, match=r"data\.prompt is not UTF-8 text, see 'caf\\udce9'") as caught:
        config.parse_run(content)
    str(caught.value).encode()


def test_a_section_given_whole_takes_further_options():
    content = config.apply(MINIMAL, ["train={steps: 5, lr: 1e-3}", "train.lr=2e-3", "adapter={name: lora, rank: 2}"])
    run = config.parse_run(config.apply(content, ["adapter.rank=3"]))
    assert run.train.steps == 5 and run.train.lr == 2e-3 and run.adapter["rank"] == 3


# What is written after the equals sign, and what an option of each type makes of it.
WRITTEN = [
    ("data.trigger", 'a sign that says "OPEN"', 'a sign that says "OPEN"'),
    ("data.trigger", "the dogs'", "the dogs'"),
    ("data.trigger", "'the dogs''", "'the dogs''"),
    ("data.trigger", "- a circle", "- a circle"),
    ("data.trigger", "#1 dog", "#1 dog"),
    ("data.trigger", "[a, b]", "[a, b]"),
    ("data.trigger", "{red|blue}", "{red|blue}"),
    ("data.trigger", "true", "true"),
    ("data.trigger", "1e5", "1e5"),
    ("data.trigger", '"sks"', "sks"),
    ("data.trigger", "\"'sks'\"", "'sks'"),
    ("data.trigger", "", ""),
    ("data.prompt", "[trigger]", "[trigger]"),
    ("data.prompt", "[a], [b]", "[a], [b]"),
    ("data.prompt", "null", None),
    ("data.class_noun", "null", "object"),
    ("data.flip", "true", True),
    ("data.flip", "no", False),
    ("data.ignore", "mask", "mask"),
    ("data.ignore", "[mask, '*.json']", ["mask", "*.json"]),
    ("data.ignore", "[no, 1]", ["no", "1"]),
    ("data.ignore", "[Trigger]", "[Trigger]"),
    ("data.columns", "{mask: no, image: 1}", {"mask": "no", "image": "1"}),
    ("data.resolution", "null", None),
    ("data.resolution", "", None),
    ("data.resolution", "64", 64),
    ("train.betas", "[0.5, 0.9]", (0.5, 0.9)),
    ("train.precision", "no", "no"),
    ("train.part_lr", "{text: 5e-5}", {"text": 5e-5}),
    ("preview.prompts", "[a cat, yes, 12]", ["a cat", "yes", "12"]),
    ("preview.seeds", "[1, 2]", [1, 2]),
    ("adapter.targets", "[to_q, to_k]", ["to_q", "to_k"]),
    ("adapter.targets", "attention", "attention"),
]


@pytest.mark.parametrize(("option", "text", "expected"), WRITTEN)
def test_the_type_of_an_option_reads_what_is_written(option, text, expected):
    section, _, name = option.partition(".")
    run = config.parse_run(config.apply(MINIMAL, [f"{option}={text}"]))
    value = getattr(run, section)
    assert (value[name] if isinstance(value, dict) else getattr(value, name)) == expected
    # What was read is what a run that goes on reads.
    assert config.parse_run({k: v for k, v in run.resolved().items() if k != "verb"}) == run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a cat, a dog]", ["a cat", "a dog"]),
        ("[[trigger] asleep, a dog]", "[[trigger] asleep, a dog]"),
        ('["[trigger] asleep", a dog]', ["[trigger] asleep", "a dog"]),
        ("[{a: b}]", "[{a: b}]"),
        ("[class]", "[class]"),
        ("[[[[", "[[[["),
        ("a very detailed circle, " * 20 + "8k. sharp", "a very detailed circle, " * 20 + "8k. sharp"),
    ],
)
def test_a_text_is_a_list_only_where_it_is_one_of_texts(text, expected):
    assert config.load_sample("sample/prompts", [f"prompts={text}"]).prompts == expected


def test_options_without_a_type_are_read_as_yaml_reads_them():
    from visiontune.schema import spelt

    read = {"1e-8": 1e-8, "2": 2, "true": True, "[0.9, 0.99]": [0.9, 0.99], "null": None, "std": "std", "{": "{"}
    assert {text: spelt(text) for text in read} == read
    assert type(spelt("2")) is int and spelt(0.5) == 0.5


def test_dynamics_may_be_a_mapping_on_the_command_line():
    made = config.apply({**MINIMAL, "objective": "ddpo"}, ["objective.dynamics={name: ddim, eta: 0.5}"])
    assert config.parse_run(made).objective["dynamics"] == {"name": "ddim", "eta": 0.5}


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
        ({"adapter": {"name": "lora", "targets": {"a": 1}}}, "adapter.targets must be text or a list of texts"),
        ({"adapter": {"rank": 2}}, "adapter.name is missing"),
        ({"adapter": {"name": "lora", "start": [1]}}, "adapter.start must be the adapter.safetensors of a run, not"),
        ({"adapter": {"name": "lora", "under": [1]}}, "adapter.under must be an adapter file, the folder of a run, or"),
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
