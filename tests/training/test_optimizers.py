"""Optimisers from outside: those of two modes, those without weight decay, and what is no optimiser."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import TinyModel, interrupt, tiny_trainer

from visiontune.adapters import attach, lora
from visiontune.errors import UserError
from visiontune.training import optim, result


class TwoModes(torch.optim.Optimizer):
    """Schedule-free SGD: trains y between z, which steps, and their mean x, which is the result."""

    def __init__(self, params, lr, weight_decay=0.0, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "train_mode": False, "k": 0})

    @torch.no_grad()
    def _mix(self, weight, mode):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        share = weight(group["beta"])
                        p.copy_(p * (1 - share) + self.state[p]["z"] * share)  # which rounds, there and back
                group["train_mode"] = mode

    def eval(self):
        self._mix(lambda beta: 1 - 1 / beta, False)

    def train(self):
        self._mix(lambda beta: 1 - beta, True)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "a step in evaluation mode"
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / group["beta"])
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["k"])
                p.copy_(x.lerp(z, 1 - group["beta"]))


class Bare(torch.optim.SGD):
    """Takes a rate alone."""

    def __init__(self, params, lr):
        super().__init__(params, lr)


class Closure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


class Broken(torch.optim.SGD):
    def __init__(self, params, lr, weight_decay=0.0):
        sys.exit("not today")


def named(kind: type) -> str:
    return f"{__name__}.{kind.__name__}"


def run(folder, **train):
    """A short run of an adapter, with a rate at which modes differ."""
    model = TinyModel()
    adapter = attach(model.of("unet"), lora.Config(rank=2), targets=["Conv2d"])
    options = {"optimizer": named(TwoModes), "lr": 0.05, "checkpoint_every": 3, "steps": 6, **train}
    return tiny_trainer(folder, model=model, adapters=adapter, **options)


def values(trainer):
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


def results(trainer):
    """By hand, from what the optimiser keeps."""
    state, beta = optim.raw(trainer.optimizer).state, 0.9
    return {name: p.detach().lerp(state[p]["z"], 1 - 1 / beta) for name, p in trainer.parameters.items()}


def test_the_result_is_that_of_evaluation_mode_and_training_goes_on_where_it_was(tmp_path):
    trainer = run(tmp_path)
    path = trainer.fit()
    trained, wanted = values(trainer), results(trainer)
    with trainer.looking():
        seen = values(trainer)
    for name, value in wanted.items():
        torch.testing.assert_close(seen[name], value)
        assert torch.equal(trainer.parameters[name], trained[name])
    assert max(float((seen[name] - trained[name]).abs().max()) for name in seen) > 1e-4
    assert all(group["train_mode"] for group in trainer.optimizer.param_groups)
    before = load_file(path)
    result.write(trainer, {})
    assert all(torch.equal(load_file(path)[name], value) for name, value in before.items())
    kept = sorted(tensor.norm().item() for tensor in before.values())
    assert kept == pytest.approx(sorted(value.norm().item() for value in wanted.values()), rel=1e-5)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_looking_changes_nothing_and_a_run_that_was_stopped_ends_in_the_same_bits(tmp_path, ema):
    whole = run(tmp_path / "whole", ema=ema)
    whole.fit()
    interrupt(run(tmp_path / "broken", ema=ema), 3)
    broken = run(tmp_path / "broken", ema=ema, resume=True)
    with broken.looking():
        pass
    broken.fit()
    assert all(torch.equal(broken.parameters[name], value) for name, value in whole.parameters.items())
    files = [load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(files[1][name], value) for name, value in files[0].items())


def test_what_is_averaged_is_the_result_of_each_step(tmp_path):
    trainer, seen = run(tmp_path, ema=0.0, steps=3), []
    update = trainer._update
    trainer._update = lambda step: (update(step), seen.append(results(trainer)))
    trainer.fit()
    for name, value in zip(trainer.parameters, trainer.average.shadow, strict=True):
        torch.testing.assert_close(value, seen[-1][name])


def test_an_optimiser_without_weight_decay_can_be_named(tmp_path):
    run(tmp_path / "a", optimizer=named(Bare), steps=1).fit()
    run(tmp_path / "b", optimizer=named(Bare), steps=1, weight_decay=0.0)
    with pytest.raises(UserError, match=r"train.weight_decay: optimizer '.*Bare' has none; set it to 0"):
        run(tmp_path / "c", optimizer=named(Bare), weight_decay=0.1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (named(Closure), "computes the loss anew in a step"),
        ("torch.optim.LBFGS", "computes the loss anew in a step"),
        (named(Broken), r"when it is made, called exit\(not today\) \(test_optimizers.py, line \d+\)"),
        ("..foo", "cannot be loaded"),
        ("visiontune.files.Nothing", "cannot be loaded"),
    ],
)
def test_what_cannot_be_stepped_or_made_is_refused_in_a_line(tmp_path, name, words):
    with pytest.raises(UserError, match=words) as error:
        run(tmp_path, optimizer=name)
    assert "\n" not in str(error.value)
