from __future__ import annotations

import json
import re
import signal

import pytest
import torch
from processes import apart
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_training import TinyModel, TinyRows, interrupt, tiny_trainer
from training import worker

from visiontune import adapters
from visiontune.errors import UserError
from visiontune.training import checkpoint
from visiontune.training.trackers import forget_after


def tensors(state, path=""):
    """Every tensor and number in nested state, by path."""
    if isinstance(state, dict):
        return {k: v for key, item in state.items() for k, v in tensors(item, f"{path}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for i, item in enumerate(state) for k, v in tensors(item, f"{path}/{i}").items()}
    return {path: state}


def assert_same(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert same, key


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_run_killed_twice_ends_in_the_same_bits(tmp_path):
    """Killed in a step (batch 15 is the second half of step 8), then in the middle of writing a checkpoint."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    worker.trainer(whole).fit()
    left = apart("training.worker:deaths", broken, "batch:15", "save:12")
    assert left == [[-signal.SIGKILL, 3, 6], [-signal.SIGKILL, 6, 9]]
    assert list((broken / "checkpoints").glob(".*"))
    worker.trainer(broken).fit()

    assert_same(load_file(broken / "model" / "weights.safetensors"), load_file(whole / "model" / "weights.safetensors"))
    ours, theirs = (checkpoint.load(checkpoint.latest(out)) for out in (broken, whole))
    assert theirs[1]["step"] == worker.STEPS
    for state in (ours[1], theirs[1]):
        del state["parts"]["meter"]
    assert_same(ours, theirs)
    assert metrics(broken) == metrics(whole)
    assert [row["step"] for row in metrics(whole)] == [4, 8, 12, 13]
    assert not list((broken / "checkpoints").glob(".*"))


def test_two_processes_train_like_one_with_both_their_batches(tmp_path):
    assert apart("training.worker:two", tmp_path / "two") == [0, 0]
    result = worker.shared(tmp_path / "one", 4).fit()
    one, two = load_file(result / "weights.safetensors"), load_file(tmp_path / "two" / "model" / "weights.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)
    assert [row["step"] for row in metrics(tmp_path / "two")] == [2, 4]
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def sd_trainer(out, **options):
    model = tiny_model("sd")
    torch.manual_seed(0)  # LoRA starts at random
    found = adapters.attach(model.of("denoiser", "text"), "lora", targets=["to_q", "q_proj"])
    defaults = {
        "steps": 4,
        "checkpoint_every": 2,
        "ema": 0.5,
        "resume": True,
        "parts": ["denoiser", "text"],
        "lr": 1e-3,
    }
    return tiny_trainer(out, model=model, rows=TinyRows(model, embedded=False), adapters=found, **defaults | options)


def test_an_adapter_goes_on_from_its_checkpoint(tmp_path):
    sd_trainer(tmp_path / "whole").fit()
    interrupt(sd_trainer(tmp_path / "broken"), 3)
    assert not (tmp_path / "broken" / "adapter.safetensors").exists()
    sd_trainer(tmp_path / "broken").fit()
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "broken"))
    assert_same(one, other)
    moved = {key.partition(".")[0] for key, value in one.items() if key.endswith("up") and value.any()}
    assert moved == {"text_encoder", "unet"}


def test_more_steps_may_be_asked_for(tmp_path):
    tiny_trainer(tmp_path / "a", steps=6, checkpoint_every=2).fit()
    tiny_trainer(tmp_path / "b", steps=4, checkpoint_every=2).fit()
    result = tiny_trainer(tmp_path / "b", steps=6, checkpoint_every=2, resume=True).fit()
    assert_same(load_file(result / "weights.safetensors"), load_file(tmp_path / "a" / "model" / "weights.safetensors"))


def test_a_run_goes_on_with_the_options_asked_for_now(tmp_path):
    """A lower learning rate is what one goes on with after a loss that was not a number."""
    tiny_trainer(tmp_path, steps=4, lr=1e-2, log_every=2, weight_decay=0.1).fit()
    options = {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.8, 0.9), "warmup": 8, "ema": 0.5}
    trainer = tiny_trainer(tmp_path, steps=8, log_every=2, resume=True, **options)
    trainer.fit()
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx([1e-2, 1e-2, 7.5e-4, 1e-3])
    group = trainer.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["initial_lr"]) == (0.0, (0.8, 0.9), 1e-3)
    # The average starts at the weights of step 4, not at those of step 0.
    saved, _ = checkpoint.load(checkpoint.folder(tmp_path, 4))
    for (name, p), shadow in zip(trainer.parameters.items(), trainer.average.shadow, strict=True):
        assert (shadow - saved[name]).abs().max() <= 2 * (p - saved[name]).abs().max()


def test_a_run_cannot_go_back(tmp_path):
    tiny_trainer(tmp_path, steps=4).fit()
    with pytest.raises(UserError, match=r"step-000004 is past train\.steps=3"):
        tiny_trainer(tmp_path, steps=3, resume=True).fit()


def test_a_finished_run_is_not_written_over(tmp_path):
    tiny_trainer(tmp_path).fit()
    before = (tmp_path / "model" / "weights.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"train\.resume=true"):
        tiny_trainer(tmp_path, seed=1).fit()
    assert (tmp_path / "model" / "weights.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "name"),
    [({"seed": 1}, "seed=0"), ({"batch_size": 3}, "batch_size=4"), ({"optimizer": "sgd"}, "optimizer=adamw")],
)
def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path, change, name):
    tiny_trainer(tmp_path).fit()
    with pytest.raises(UserError, match=name):
        tiny_trainer(tmp_path, steps=8, resume=True, **change).fit()


def test_weights_of_another_shape_are_named(tmp_path):
    tiny_trainer(tmp_path).fit()
    with pytest.raises(UserError, match=r"unet\.first"):
        tiny_trainer(tmp_path, model=TinyModel(width=8), resume=True, steps=8).fit()


def test_a_damaged_checkpoint_is_named(tmp_path):
    tiny_trainer(tmp_path).fit()
    (checkpoint.latest(tmp_path) / "state.pt").write_bytes(b"no")
    with pytest.raises(UserError, match="step-000004"):
        tiny_trainer(tmp_path, resume=True, steps=8).fit()


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    (tmp_path / "recipe.yaml").write_text("verb: train")
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "lo')
    tiny_trainer(tmp_path, resume=True, log_every=2).fit()
    assert [row["step"] for row in metrics(tmp_path)] == [2, 4]


def test_metrics_of_lost_steps_are_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    forget_after(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    tiny_trainer(tmp_path, steps=10, checkpoint_every=2, keep=3).fit()
    assert checkpoint.steps(tmp_path) == [6, 8, 10]


# ---------------------------------------------------------------------------------------------------- other versions


def as_of_0_1(folder):
    """Rewrite a checkpoint of the tiny model as visiontune 0.1 laid it out."""
    weights, state = checkpoint.load(folder)
    parts = state.pop("parts")
    optimisation = parts.pop("optimisation")
    state |= {"optimizer": optimisation["optimizer"], "schedule": optimisation["taken"], "online": None, "guard": None}
    state |= {"average": parts["average"], "meter": parts["meter"], "scaler": None}
    torch.save(state, folder / "state.pt")
    save_file({re.sub(r"^unet\.", "denoiser.", name): t for name, t in weights.items()}, folder / "weights.safetensors")


def test_a_checkpoint_of_the_first_version_goes_on_to_the_same_bits(tmp_path):
    options = {"steps": 4, "checkpoint_every": 2, "ema": 0.5, "schedule": "cosine", "lr": 1e-2}
    tiny_trainer(tmp_path / "whole", **options).fit()
    tiny_trainer(tmp_path / "old", **options | {"keep": 2}).fit()
    for step in (2, 4):
        as_of_0_1(checkpoint.folder(tmp_path / "old", step))
    checkpoint.remove_folder(checkpoint.folder(tmp_path / "old", 4))
    tiny_trainer(tmp_path / "old", **options, resume=True).fit()
    ours, theirs = (load_file(tmp_path / run / "model" / "weights.safetensors") for run in ("old", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    "row", ["[]", "5", "null", "{}", '{"step": "x"}', "[" * 100_000, '{"step": ' + "9" * 5000 + "}", ""]
)
def test_a_row_of_metrics_of_another_shape_is_one_line_and_nothing_is_lost(tmp_path, row):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text := f'{{"step": 1}}\n{row}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2"):
        forget_after(path, 1)
    assert path.read_text() == text
