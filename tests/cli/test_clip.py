"""A CLIP from the recipe to a table of what it tells apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_rewards import tiny_clip_folder

from visiontune.adapters import read_header

WORDS = ["red dog, blue cat", "green cat", "two dogs"]


@pytest.fixture
def pairs(tmp_path):
    """Three captioned pictures, and a tiny CLIP beside them."""
    tiny_clip_folder(tmp_path / "tiny", 16)
    folder = tmp_path / "pairs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, words in enumerate(WORDS):
        Image.fromarray(rng.integers(0, 255, (20, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(words)
    return folder


def words(*more: str) -> list[str]:
    own = ["model=tiny", "data.root=pairs", "train.steps=2", "train.batch_size=3", "train.trackers=[]"]
    return [*own, "train.device=cpu", *more]


def test_runs_of_adapters_and_of_all_weights_are_compared(cli, pairs):
    for recipe, name in (("clip/fsc", "apart"), ("clip/full", "whole")):
        made = cli("train", recipe, f"name={name}", *words("train.lr=1e-2"))
        assert made.code == 0, made.err
    assert Path("runs/whole/model/config.json").is_file()
    # No caption has the trigger that a run has when nothing is said.
    assert "answers to" not in Path("runs/apart/README.md").read_text()
    assert "trigger" not in read_header(Path("runs/apart/adapter.safetensors"))
    found = cli("evaluate", "clip", "tiny", "runs/apart", "runs/whole", "--data", "pairs", "--out", "apart.json")
    assert found.code == 0, found.err
    assert "runs/apart beside tiny: retrieval" in found.out and "runs/whole beside tiny: retrieval" in found.out
    reports = json.loads(Path("apart.json").read_text())["models"]
    assert [report["model"] for report in reports] == ["tiny", "runs/apart", "runs/whole"]
    kinds = {row["what"]: row for row in reports[0]["rows"]}
    assert kinds["its caption, not one with words swapped"]["n"] == 1
    assert kinds["caption of a picture, top-1 of 3"]["chance"] == pytest.approx(1 / 3)


def test_pocket_scenes_are_asked_for_by_attributes(cli):
    found = cli("evaluate", "clip", "--data", "pocket/hatched", "--count", "2")
    assert found.code == 0, found.err
    assert "shapeless" in found.out and "means: recognition" in found.out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["clip", "pocket/sd"], "'pocket/sd' is a sd, which does not compare pictures with texts: name a CLIP"),
        (["clip", "--scales", "0.5"], "--scales: is not of 'visiontune evaluate clip'"),
        (["clip", "--steps", "3", "--clip", "pocket/clip"], "--steps --clip: is not of 'visiontune evaluate clip'"),
        (["clip", "--data", "nowhere"], "nowhere"),
        (["clip", "--device", "abacus"], "--device 'abacus' is not on this machine"),
        (["compose", "--data", "pairs"], "--data is for 'visiontune evaluate clip'"),
    ],
)
def test_what_cannot_be_told_apart_is_one_line(cli, given, message):
    found = cli("evaluate", *given)
    assert found.code == 2 and message in found.err and found.err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model=pocket/sd", "objective=contrastive is for models of pictures and texts (clip)"),
        ("objective=denoising", "has none: take another model"),
        ("preview.prompts=['a cat']", "draws no pictures: set preview.prompts=[]"),
        ("train.parts=[denoiser]", "has no part 'denoiser'"),
        ("objective={name: fsc_clip, negatives: []}", "take contrastive"),
        ("objective={name: fsc_clip, negatives: [invert]}", "objective.negatives"),
    ],
)
def test_what_cannot_be_trained_is_one_line(cli, pairs, option, message):
    found = cli("train", "clip/lora", *words(option))
    assert found.code == 2 and message in found.err and found.err.count("\n") == 1
    assert not Path("runs/clip_lora").exists() or not any(Path("runs/clip_lora").iterdir())
