"""GaLore of pytorch_optimizer, and options that matrices alone get."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import TinyModel, tiny_trainer
from torch.nn import Parameter

from visiontune import adapters
from visiontune.errors import UserError
from visiontune.training import checkpoint, optim
from visiontune.training.config import TrainConfig

MATRIX = {"rank": 2, "update_proj_gap": 3, "scale": 0.5, "projection_type": "std"}


def parameters():
    torch.manual_seed(0)
    shapes = {"matrix": (6, 10), "bias": (6,), "kernel": (4, 3, 3, 3), "encoder.matrix": (8, 5), "encoder.bias": (8,)}
    return {name: Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def test_matrices_have_groups_of_their_own():
    chosen = parameters()
    train = TrainConfig(lr=1.0, matrix_options={"weight_decay": 0.25}, weight_decay=0.0)
    made = optim.make_optimizer(chosen, train, {"encoder": ("text", 0.5)})
    found = [(g["lr"], g["weight_decay"], len(g["params"])) for g in made.param_groups]
    assert found == [(1.0, 0.25, 1), (1.0, 0.0, 2), (0.5, 0.25, 1), (0.5, 0.0, 1)]
    assert made.param_groups[0]["params"][0] is chosen["matrix"]
    assert len(optim.make_optimizer(chosen, TrainConfig(), {}).param_groups) == 1


def test_an_optimiser_that_would_pass_over_them_is_refused():
    with pytest.raises(UserError, match=r"train\.matrix_options\.rank is no option of adamw: did you mean galore"):
        optim.make_optimizer(parameters(), TrainConfig(matrix_options={"rank": 4}), {})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match=r"'galore' needs 'pytorch_optimizer', which is not installed: pip install"):
        optim.make_optimizer(parameters(), TrainConfig(optimizer="galore"), {})


def adam(gradients, lr, eps=1e-6):
    """Adam's step after the last of ``gradients``."""
    m, v = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for g in gradients:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    n = len(gradients)
    return -lr * (1 - 0.999**n) ** 0.5 / (1 - 0.9**n) * m / (v.sqrt() + eps)


def test_matrices_are_projected_and_the_rest_is_adams():
    """The paper's algorithm 1: R = P^T G, Adam on R, and the step is scale P N."""
    pytest.importorskip("pytorch_optimizer")
    chosen, lr = parameters(), 0.01
    train = TrainConfig(optimizer="galore", lr=lr, weight_decay=0.0, matrix_options=MATRIX)
    made = optim.make_optimizer(chosen, train, {})
    rng, history = torch.Generator().manual_seed(1), {name: [] for name in chosen}
    for step in range(1, 3):
        before = {name: p.detach().clone() for name, p in chosen.items()}
        for name, p in chosen.items():
            p.grad = torch.randn(p.shape, generator=rng)
            history[name].append(p.grad.clone())
        made.step()
        for name, p in chosen.items():
            if p.dim() == 2:
                u, _, vh = torch.linalg.svd(history[name][0], full_matrices=False)
                tall = p.shape[0] >= p.shape[1]
                low = [g @ vh[:2].T if tall else u[:, :2].T @ g for g in history[name]]
                moved = adam(low, lr)
                expected = 0.5 * (moved @ vh[:2] if tall else u[:, :2] @ moved)
            else:
                expected = adam(history[name], lr)
            torch.testing.assert_close(p - before[name], expected, rtol=1e-3, atol=1e-6, msg=f"{name}, step {step}")
    inner = made.state[chosen["matrix"]]
    assert inner["exp_avg"].shape == (2, 10)
    assert sum(t.numel() for t in optim.state_tensors(inner)) == 2 * 2 * 10 + 6 * 2


@pytest.mark.parametrize("adapter", [None, "dense"])
def test_a_run_goes_on_as_if_uninterrupted(adapter, tmp_path):
    """The projections are objects in the optimiser's state, which a checkpoint has to bring back."""
    pytest.importorskip("pytorch_optimizer")

    def run(out, steps, **options):
        model = TinyModel()
        found = None
        if adapter:
            found = adapters.attach({"unet": model.denoiser}, adapter, targets=["Linear", "Conv2d"])
        trainer = tiny_trainer(
            out, model=model, adapters=found, steps=steps, checkpoint_every=2, lr=0.01, optimizer="galore",
            matrix_options=MATRIX, **options,
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        trainer.fit()
        return trainer, before

    whole, before = run(tmp_path / "a", 5)
    run(tmp_path / "b", 2)
    resumed, _ = run(tmp_path / "b", 5, resume=True)
    for name, p in whole.parameters.items():
        torch.testing.assert_close(resumed.parameters[name], p, rtol=0, atol=0)
        assert not torch.equal(before[name], p)


def test_objects_of_other_packages_stay_out_of_checkpoints(tmp_path):
    import fractions

    checkpoint.save(tmp_path, 1, {"w": torch.ones(1)}, {"optimizer": fractions.Fraction(1, 2)}, keep=1)
    path = checkpoint.folder(tmp_path, 1)
    for package in (None, "pytorch_optimizer"):
        with pytest.raises(UserError, match="cannot be read"):
            checkpoint.load(path, package)
    assert load_file(path / checkpoint.WEIGHTS)["w"].item() == 1
