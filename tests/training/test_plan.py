"""Planning before the first step: where its batches sample the schedule, and that a run keeps what was decided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny
from tiny_training import interrupt

from visiontune import config
from visiontune.adapters import AdapterSet
from visiontune.assemble import assemble
from visiontune.training.plan import stratified


@pytest.mark.parametrize("world", [1, 3])
def test_all_processes_together_sample_the_schedule_evenly(world):
    places = torch.cat([stratified(4, world, rank, seed=5) for rank in range(world)])
    expected = (torch.arange(4 * world) + 0.5) / (4 * world)
    torch.testing.assert_close(places.sort().values, expected)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """EVA for three steps on a tiny model and two images."""
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text("a photo of a [trigger] circle")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""verb: train
name: whole
model: {save_tiny(tmp_path / "tiny-sd")}
adapter: {{name: eva, targets: attention, rank: 2, batches: 2}}
data: {{root: {photos}, class_noun: circle}}
train: {{steps: 3, batch_size: 1, checkpoint_every: 1, lr: 1e-2, trackers: [], device: cpu}}
"""
    )
    return path


def ranks(trainer):
    return [adapter.rank for adapter in trainer.adapters.adapters().values()]


def same(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_run_goes_on_with_its_plan_and_another_run_makes_its_own(recipe, tmp_path, monkeypatch):
    whole = assemble(config.load_run(recipe))
    assert sum(ranks(whole)) == 2 * len(ranks(whole)) and len(set(ranks(whole))) > 1
    planned = load_file("runs/whole/plan.safetensors")
    assert not any(value.any() for key, value in planned.items() if key.endswith("up"))
    whole.fit()
    trained = load_file("runs/whole/adapter.safetensors")
    assert any(value.any() for key, value in trained.items() if key.endswith("up"))
    assert load_file("runs/whole/plan.safetensors").keys() == trained.keys()

    plans, prepare = [], AdapterSet.prepare
    monkeypatch.setattr(AdapterSet, "prepare", lambda self, *args: (plans.append(self), prepare(self, *args)))
    broken = assemble(config.load_run(recipe, ["name=broken"]))
    assert len(plans) == 1 and same("runs/whole/plan.safetensors", "runs/broken/plan.safetensors")
    interrupt(broken, 2)

    # What the task would say now does not matter any more.
    before = (tmp_path / "runs/broken/plan.safetensors").read_bytes()
    resumed = assemble(config.load_run(recipe, ["name=broken", "train.resume=true"]))
    assert len(plans) == 1 and ranks(resumed) == ranks(whole)
    resumed.fit()
    assert (tmp_path / "runs/broken/plan.safetensors").read_bytes() == before
    assert same("runs/whole/adapter.safetensors", "runs/broken/adapter.safetensors")

    assemble(config.load_run(recipe, ["name=other", "seed=1"]))
    assert len(plans) == 2 and not same("runs/whole/plan.safetensors", "runs/other/plan.safetensors")


@pytest.mark.parametrize("method", ["corda", "lora_sb"])
def test_other_plans_go_through_a_run_as_well(recipe, method):
    trainer = assemble(config.load_run(recipe, [f"adapter.name={method}", "train.steps=1"]))
    assert load_file(trainer.fit()).keys() == load_file("runs/whole/plan.safetensors").keys()
