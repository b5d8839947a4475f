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


def _two(model):
    """A rate of its own for the weight, by an optimiser with a state of its own."""
    return [torch.optim.SGD([model.weight], lr=0.1, momentum=0.5), torch.optim.AdamW([model.bias], lr=0.05)]


def _fit(folder, steps, stop_at=None, optimizers=None):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_at(step):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    given = {"optimizers": optimizers(model)} if optimizers else {"lr": 0.05}
    return fit(model, loss_at, steps=steps, folder=folder, warmup=5, log_every=5, save_every=10, **given)


@pytest.mark.parametrize("optimizers", [None, _two])
def test_an_interrupted_run_ends_with_the_weights_of_a_whole_one(tmp_path, optimizers):
    whole = _fit(tmp_path / "whole", 40, optimizers=optimizers)
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "cut", 40, stop_at=27, optimizers=optimizers)
    again = _fit(tmp_path / "cut", 40, optimizers=optimizers)
    assert torch.equal(whole.weight, again.weight) and torch.equal(whole.bias, again.bias)
    assert not torch.equal(again.weight, nn.Linear(3, 1).weight)


def test_each_optimiser_has_the_schedule_of_its_own_rate(tmp_path):
    torch.manual_seed(0)
    model, seen = nn.Linear(3, 1), []
    pair = _two(model)

    def loss_at(step):
        seen.append([optimizer.param_groups[0]["lr"] for optimizer in pair])
        return {"loss": model(torch.ones(1, 3)).square().mean()}

    fit(model, loss_at, steps=20, folder=tmp_path, optimizers=pair, warmup=4)
    wanted = [[rate * warm_cosine(step, 20, 4) for rate in (0.1, 0.05)] for step in range(19)]
    assert torch.allclose(torch.tensor(seen[1:]), torch.tensor(wanted))


def test_it_learns(tmp_path):
    fitted = _fit(tmp_path, 300)
    assert torch.allclose(fitted.weight, torch.ones(1, 3), atol=0.05)


def test_images_become_tensors_between_minus_one_and_one():
    picture = np.zeros((2, 4, 3), np.uint8)
    picture[0, 1] = (255, 0, 51)
    tensor = images_to_tensor([picture])
    assert tensor.shape == (1, 3, 2, 4)
    assert torch.allclose(tensor[0, :, 0, 1], torch.tensor([1.0, -1.0, -0.6]))
