"""The loop that makes the pocket models: its schedule, its average, and going on after an interruption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from visiontune.training.ema import warm_average
from visiontune.training.pretrain import fit, images_to_tensor, warm_cosine


def test_the_learning_rate_rises_then_falls_to_two_percent():
    rates = [warm_cosine(step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0) and rates.index(max(rates)) in (9, 10)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.02)


def test_the_average_forgets_the_first_weights_soon_and_ends_at_its_decay():
    average, update = [torch.zeros(2)], warm_average(0.9)
    update(average, [torch.ones(2)], torch.tensor(0))
    assert torch.allclose(average[0], torch.full((2,), 0.9))  # decay 1 / 10
    average = [torch.zeros(2)]
    update(average, [torch.ones(2)], torch.tensor(10_000))
    assert torch.allclose(average[0], torch.full((2,), 0.1))  # decay 0.9


def _fit(folder, steps, stop_at=None):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_at(step):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    return fit(model, loss_at, steps=steps, lr=0.05, folder=folder, warmup=5, log_every=5, save_every=10)


def test_an_interrupted_run_ends_with_the_weights_of_a_whole_one(tmp_path):
    whole = _fit(tmp_path / "whole", 40)
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "cut", 40, stop_at=27)
    again = _fit(tmp_path / "cut", 40)
    assert torch.equal(whole.weight, again.weight) and torch.equal(whole.bias, again.bias)
    assert not torch.equal(again.weight, nn.Linear(3, 1).weight)


def test_it_learns(tmp_path):
    fitted = _fit(tmp_path, 300)
    assert torch.allclose(fitted.weight, torch.ones(1, 3), atol=0.05)


def test_images_become_tensors_between_minus_one_and_one():
    picture = np.zeros((2, 4, 3), np.uint8)
    picture[0, 1] = (255, 0, 51)
    tensor = images_to_tensor([picture])
    assert tensor.shape == (1, 3, 2, 4)
    assert torch.allclose(tensor[0, :, 0, 1], torch.tensor([1.0, -1.0, -0.6]))
