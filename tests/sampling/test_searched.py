"""`sample` with a search: what it says, what the manifest keeps, and that any kill is survived."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import save_tiny, tiny_model

from visiontune.errors import UserError
from visiontune.ops.pixels import to_tensor
from visiontune.rewards.loading import load
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.generate import generate
from visiontune.sampling.pipeline import images
from visiontune.schema import from_mapping

PROMPTS = ["a red circle", "a blue square", "a green triangle"]
SEARCH = {"best_of": "2", "reward": "brightness", "held_out": "jpeg"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny-sd"))


def config(folder, out, **options):
    given = {"model": str(folder), "out": str(out), "prompts": PROMPTS, "seeds": 1, "steps": 2, "batch_size": 4}
    return from_mapping(SampleConfig, {**given, "device": "cpu", "search": SEARCH, **options})


def rows(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out, said = tmp_path_factory.mktemp("finished"), []
    generate(config(folder, out), say=said.append)
    return out, said


def test_the_manifest_says_what_was_drawn_and_by_what_it_was_judged(finished):
    out, said = finished
    for row in rows(out):
        search = row["search"]
        scores = [one["reward"] for one in search["drawn"]]
        assert search["reward"] == [scores[0], max(scores)] and search["drawn"][0]["seed"] == row["seed"]
        again = images(tiny_model("sd"), row["prompt"], search["drawn"][search["kept"]]["seed"], steps=2)[0]
        assert np.abs(again.astype(int) - read(out / row["file"])).max() <= 2
        kept = load("jpeg")(to_tensor(read(out / row["file"])[None]), [row["prompt"]])
        assert search["held_out"][1] == pytest.approx(float(kept)) and row["settings"]["search"] == {
            **SEARCH,
            "best_of": 2,
        }
    assert any(row["search"]["held_out"][0] != row["search"]["held_out"][1] for row in rows(out))
    plan, searched, held_out = said
    assert "2 are drawn" in plan and "8 pictures, 4 without search" in plan
    gain = [np.mean([row["search"]["reward"][side] for row in rows(out)]) for side in (0, 1)]
    assert searched == f"reward searched by: {gain[0]:.4g} without search, {gain[1]:.4g} with it, mean of 3 pictures"
    assert held_out.startswith("reward held out: -")


def test_a_run_that_was_killed_goes_on_bit_for_bit(folder, finished, tmp_path):
    out, _ = finished
    names = ["00000_seed0.png", "manifest.jsonl"]
    (tmp_path / names[0]).write_bytes((out / names[0]).read_bytes())
    lines = (out / names[1]).read_bytes().splitlines(keepends=True)
    (tmp_path / names[1]).write_bytes(lines[0] + lines[1][:-40])
    generate(config(folder, tmp_path))
    for file in out.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_another_search_in_the_same_folder_is_refused(folder, finished, monkeypatch):
    out, _ = finished
    monkeypatch.setattr("visiontune.models.load", lambda *_, **__: pytest.fail("loaded the model"))
    again = []
    generate(config(folder, out, search={**SEARCH, "best_of": 2}), say=again.append)
    assert [line.partition(":")[0] for line in again] == ["reward searched by", "reward held out"]
    for search in (None, {**SEARCH, "best_of": 3}):
        with pytest.raises(UserError, match="search was"):
            generate(config(folder, out, search=search))


def test_mistakes_are_found_before_a_model_is_opened(tmp_path):
    with pytest.raises(UserError, match="did you mean 'best_of'"):
        generate(config("no-model", tmp_path / "out", search={"best_off": 2, "reward": "brightness"}))
    assert not (tmp_path / "out").exists()


def test_without_a_held_out_reward_it_says_what_that_hides(folder, tmp_path, caplog):
    said = []
    method = {"fk": {"n": 2, "every": 1}, "reward": "brightness"}
    generate(config(folder, tmp_path, search=method, prompts=PROMPTS[:1]), say=said.append)
    assert "search by 'brightness' alone" in caplog.text and len(said) == 2
    (row,) = rows(tmp_path)
    assert "held_out" not in row["search"] and row["search"]["weighed"][0]["step"] == 1
