"""Rows that are trained at the noise of their source (Style Tailoring)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_training import TinyModel, tiny_batch
from torch import nn

from visiontune.config import load_run
from visiontune.core import Batch
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.timesteps import Timesteps
from visiontune.errors import UserError
from visiontune.estimate import _bounds
from visiontune.objectives import denoising, dreambooth
from visiontune.objectives.base import Tools, generator, mean_where

LOW, HIGH = (0.0, 0.35), (0.35, 1.0)


def parted(model, *ranges, rows: int = 6, prior: int = 0) -> Batch:
    batch = tiny_batch(model, 0, rows, prior)
    own = [ranges[i % len(ranges)] for i in range(rows)]
    return replace(batch, timestep_range=torch.tensor([*own, *[(0.0, 1.0)] * prior]))


def drawn(model, batch: Batch, **options) -> torch.Tensor:
    objective = denoising.build(denoising.Config(timesteps=Timesteps(**options)))
    return objective.noised(model, batch.data["image"], batch, Tools(rng=generator(1)))[0]


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_no_row_has_the_noise_of_another_source(prediction):
    model = TinyModel()
    split = 350.0
    if prediction == "flow":
        # Stable Diffusion's timestep 350 has this signal-to-noise ratio.
        kept = 1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
        snr = kept[:351].prod() / (1 - kept[:351].prod())
        split, model.schedule = float(1000 / (1 + snr.sqrt())), Schedule.flow()
    t = drawn(model, parted(model, LOW, HIGH, rows=2000), density="logit_normal")
    below, above = t[::2], t[1::2]
    assert below.max() <= split and above.min() >= split - 1e-3
    if prediction == "eps":
        assert below.max() < 350
    assert below.max() > 0.95 * split and above.min() < 1.05 * split


def test_whole_ranges_are_a_plain_mixture():
    model = TinyModel()
    batch = parted(model, (0.0, 1.0))
    assert torch.equal(drawn(model, batch), drawn(model, replace(batch, timestep_range=None)))


def test_the_loss_is_of_both_and_each_is_logged():
    model = TinyModel()
    batch = parted(model, LOW, HIGH, rows=6, prior=2)
    objective = denoising.build(denoising.Config())
    loss = objective.loss(model, batch, Tools(rng=generator(2)))
    errors = objective.errors(model, batch, Tools(rng=generator(2)))
    own = [errors[0:6:2].mean(), errors[1:6:2].mean()]
    torch.testing.assert_close(loss.terms["error_0_0.35"], own[0].detach())
    torch.testing.assert_close(loss.terms["error_0.35_1"], own[1].detach())
    torch.testing.assert_close(loss.total, sum(own) / 2 + mean_where(errors, batch.prior))
    learnt = dreambooth.build(dreambooth.Config(prior="pictures")).loss(model, batch, Tools(rng=generator(2)))
    torch.testing.assert_close(learnt.terms["error_0_0.35"], own[0].detach())
    plain = objective.loss(model, parted(model, (0.0, 1.0), prior=2), Tools(rng=generator(2)))
    errors = objective.errors(model, parted(model, (0.0, 1.0), prior=2), Tools(rng=generator(2)))
    torch.testing.assert_close(plain.terms["error_0_1"], errors[:6].mean().detach())


def test_objectives_that_choose_timesteps_themselves_refuse_ranges(tmp_path):
    from visiontune.assemble.build import _check_ranges
    from visiontune.assemble.parts import open_objective

    run = load_run("compose/style_tailoring")
    _check_ranges(run, open_objective(run))
    run = load_run("compose/style_tailoring", ["objective=diffusion_dpo"])
    with pytest.raises(UserError, match=r"data\.timestep_range: objective 'diffusion_dpo'"):
        _check_ranges(run, open_objective(run))
    run = load_run("personalise/lora", ["objective.timesteps.global_share=0.3"])
    with pytest.raises(UserError, match="global_share is of rows outside"):
        _check_ranges(run, open_objective(run))


def test_what_check_plots_has_the_ranges_and_the_shares_of_the_sources():
    run = load_run("compose/style_tailoring", ["data.weight=3"])
    bounds = _bounds(run, TinyModel().schedule, 8)
    assert bounds.tolist() == [[0.7, 1.0]] * 6 + [[0.0, 0.7]] * 2
    objective = denoising.build(denoising.Config())
    t = objective.draw_timesteps(TinyModel(), (4, 8, 8), 8, generator(0), bounds)
    assert t[:6].min() >= 700 and t[6:].max() < 700
    assert _bounds(load_run("personalise/lora"), TinyModel().schedule, 8) is None


class Points(nn.Module):
    """eps of points [b, 2, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))

    def forward(self, x, t, tokens):
        level = t[:, None] / 1000
        return self.layers(torch.cat([x.flatten(1), level, level.square()], 1)).view_as(x)


def tailored(coarse: tuple[float, float], fine: tuple[float, float]) -> torch.Tensor:
    """Points [n, 2] that a model draws which learnt one set at some noise and another at the rest.

    The first has coarse value 2 and either fine value, the second either coarse value and fine value 0.3.
    """
    torch.manual_seed(0)
    model = TinyModel(denoiser=Points())
    model.denoiser.requires_grad_(True)
    objective = denoising.build(denoising.Config())
    optimizer = torch.optim.Adam(model.denoiser.parameters(), 4e-3)
    batch = tiny_batch(model, 0, 256)
    for step in range(400):
        signs = torch.randint(2, (256, 2), generator=generator(step)) * 2.0 - 1
        signs[:128, 0] = signs[128:, 1] = 1
        rows = replace(
            batch,
            data={"image": (signs * torch.tensor([2.0, 0.3])).view(-1, 2, 1, 1)},
            timestep_range=torch.tensor([coarse, fine]).repeat_interleave(128, 0),
        )
        optimizer.zero_grad()
        objective.loss(model, rows, Tools(rng=generator("t", step))).total.backward()
        optimizer.step()
    return drawn_points(model)


@torch.no_grad()
def drawn_points(model, count: int = 400) -> torch.Tensor:
    """By DDIM in 50 steps."""
    x, cond = torch.randn(count, 2, 1, 1, generator=generator("x")), model.embed([""] * count)
    for t, after in zip(*model.schedule.timesteps(50), strict=True):
        now, then = t.expand(count), after.expand(count)
        eps = model.predict(x, now, cond)
        x = model.schedule.add_noise(model.schedule.to_x_0(eps, x, now).float(), eps, then).float()
    return x.view(count, 2)


def test_coarse_things_are_of_the_set_with_much_noise_and_fine_ones_of_the_other():
    right = (tailored(HIGH, LOW) > 0).float().mean(0)
    assert right[0] > 0.85 and right[1] > 0.85  # half of all by chance
    swapped = (tailored(LOW, HIGH) > 0).float().mean(0)
    assert 0.3 < swapped[0] < 0.7 and 0.3 < swapped[1] < 0.7
