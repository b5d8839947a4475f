"""Full disks and numbers that are none end a run in one line."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import TinyModel, tiny_trainer

from visiontune.errors import UserError
from visiontune.objectives import denoising
from visiontune.training import checkpoint, trouble


class Turns(denoising.Denoising):
    """Gives a chosen value instead of the loss from one step on."""

    def __init__(self, step, value, gradient=True) -> None:
        super().__init__(denoising.Config())
        self.step, self.value, self.gradient = step, value, gradient

    def errors(self, model, batch, rng):
        errors = super().errors(model, batch, rng)
        if int(batch.ids[0].split("-")[0]) < self.step:
            return errors
        # sqrt has an infinite slope at 0: a finite loss with a gradient that is not.
        return errors * self.value if self.value != "slope" else errors + (errors - errors.detach()).abs().sqrt()


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "loss is nan"), (float("inf"), "loss is inf")])
def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, value, word):
    trainer = tiny_trainer(tmp_path, objective=Turns(6, value), steps=9, checkpoint_every=2)
    with pytest.raises(UserError, match=rf"{word} at step 7.*step-000006.*train\.resume=true"):
        trainer.fit()
    assert not (tmp_path / "model").exists()
    saved, _ = checkpoint.load(checkpoint.latest(tmp_path))
    for name, p in trainer.parameters.items():
        assert torch.equal(saved[name], p)


def test_a_gradient_that_is_not_a_number_stops_the_run(tmp_path):
    trainer = tiny_trainer(tmp_path, objective=Turns(2, "slope"), steps=9, checkpoint_every=2)
    with pytest.raises(UserError, match=r"gradient is (nan|inf) at step 3.*step-000002"):
        trainer.fit()
    assert all(p.isfinite().all() for p in trainer.parameters.values())


def test_a_bad_loss_before_the_first_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match=r"at step 1; .*no checkpoint yet"):
        tiny_trainer(tmp_path, objective=Turns(0, float("nan"))).fit()


def test_weights_that_are_not_numbers_are_not_saved(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=4, checkpoint_every=2, max_grad_norm=None)
    after = trainer._after

    def poison(step, metrics):
        if step == 4:
            next(iter(trainer.parameters.values())).data[0] = float("inf")
        after(step, metrics)

    trainer._after = poison
    with pytest.raises(UserError, match=r"after step 4 and were not saved.*step-000002"):
        trainer.fit()
    assert checkpoint.steps(tmp_path) == [2]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_torch(*args, **kwargs):
    """What torch.save makes of a full disk."""
    try:
        full()
    finally:
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")


@pytest.mark.parametrize("save", [full, full_torch])
def test_a_full_disk_stops_the_run_and_harms_nothing(tmp_path, monkeypatch, save):
    real, calls = torch.save, []

    def sometimes(*args):
        calls.append(args)
        return real(*args) if len(calls) == 1 else save()

    monkeypatch.setattr(checkpoint.torch, "save", sometimes)
    with pytest.raises(UserError, match=r"disk .* is full.*step-000002.*train\.resume=true"):
        tiny_trainer(tmp_path, steps=6, checkpoint_every=2).fit()
    assert checkpoint.steps(tmp_path) == [2]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    result = tiny_trainer(tmp_path, steps=6, checkpoint_every=2, resume=True).fit()
    whole = tiny_trainer(tmp_path / "whole", steps=6).fit()
    one, other = (load_file(folder / "weights.safetensors") for folder in (result, whole))
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("place", ["append_jsonl", "write"])
def test_a_full_disk_is_readable_wherever_it_is_met(tmp_path, monkeypatch, place):
    if place == "append_jsonl":
        monkeypatch.setattr("visiontune.training.trackers.append_jsonl", full)
    else:
        monkeypatch.setattr("visiontune.training.card.write", full)
    with pytest.raises(UserError, match="is full"):
        tiny_trainer(tmp_path).fit()


def test_full_disks_are_told_from_other_troubles(tmp_path):
    from safetensors import SafetensorError

    assert trouble.is_disk_full(OSError(errno.EDQUOT, "quota"))
    assert trouble.is_disk_full(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert not trouble.is_disk_full(OSError(errno.EACCES, "no"))
    with pytest.raises(PermissionError), trouble.readable_disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_only_trained_weights_are_checked(tmp_path):
    model = TinyModel()
    model.encoder.weight.data[0] = float("inf")
    tiny_trainer(tmp_path, model=model).fit()
