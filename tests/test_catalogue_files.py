"""Every file of the catalogue is valid, recursively, and the READMEs' tables show what is there."""

from __future__ import annotations

import json

import pytest
from catalogue_tables import END, FOLDERS, ROOT, START, readme

from visiontune import catalogue, config, plugin
from visiontune.data.base import Config as DataConfig
from visiontune.data.preflight import preflight
from visiontune.data.prompts import read_data_prompts
from visiontune.data.readers import read
from visiontune.rewards.base import Reward


@pytest.mark.parametrize("kind", catalogue.KINDS)
def test_the_catalogue_holds_specs_only(kind):
    stray = [f for f in (ROOT / kind).rglob("*") if f.is_file() and f.suffix in (".yml", ".json", ".toml")]
    assert catalogue.names(kind) and stray == []


@pytest.mark.parametrize("name", catalogue.names("pipelines"))
def test_every_recipe_is_valid_and_survives_being_resolved(name):
    content = catalogue.load("pipelines", name)
    assert content["description"]
    if content["verb"] == "sample":
        assert config.load_sample(name).prompts
        return
    run = config.load_run(name)
    assert run.name in (name.split("/")[-1], name.replace("/", "_")), "a recipe writes to a folder of its own name"
    resolved = run.resolved()
    assert resolved.pop("verb") == "train"
    assert config.parse_run(resolved) == run
    assert run.data.root in catalogue.names("datasets")


@pytest.mark.parametrize("name", catalogue.names("datasets"))
def test_every_dataset_can_be_read(name):
    spec = catalogue.load("datasets", name)
    assert spec["description"] and spec["licence"]
    if spec["source"] == "prompts":
        assert len(read_data_prompts(DataConfig(root=name, class_noun="dog"))) == len(spec["prompts"])
        return
    samples = read(DataConfig(root=name))
    preflight(samples)
    assert len(samples) == spec["count"]
    assert all(spec.get(word, "") in s.caption for s in samples for word in ("trigger", "class_noun"))


def test_there_is_a_dataset_for_every_pocket_subject():
    from visiontune.pocket.world import SUBJECTS

    specs = {name: catalogue.load("datasets", name) for name in catalogue.names("datasets")}
    assert {f"pocket/{subject}" for subject in SUBJECTS} <= specs.keys()
    for subject in SUBJECTS.values():
        assert specs[f"pocket/{subject.name}"]["class_noun"] == subject.shape
        assert specs[f"pocket/{subject.name}"]["subject"] == subject.name


@pytest.mark.parametrize("name", catalogue.names("rewards"))
def test_every_reward_spec_says_what_its_module_says(name):
    spec = config.load_reward_spec(name)
    module = plugin.load("rewards", spec.name)
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    classes = [c for c in own if issubclass(c, Reward)]
    # A mix takes after its terms, and options may narrow a range: the contract suite looks at what is built.
    assert spec.name == "mix" or [c.differentiable for c in classes] == [spec.differentiable]
    assert classes[0].range[0] <= spec.range[0] < spec.range[1] <= classes[0].range[1]
    assert spec.description


@pytest.mark.parametrize("folder", FOLDERS)
def test_readme_tables_are_up_to_date(folder):
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    assert text.count(START) == text.count(END) == 1
    assert text == readme(folder, text), "run `make tables`"


def test_every_sample_grid_lies_beside_the_json_that_reproduces_it():
    grids = [f for f in (ROOT / "samples").rglob("*") if f.suffix in (".png", ".webp")]
    for grid in grids:
        json.loads(grid.with_suffix(".json").read_text(encoding="utf-8"))
