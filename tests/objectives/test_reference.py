"""A run that stays near its base, and experts for ranges of noise that are merged (DeMe)."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny_training import TinyModel, tiny_batch
from torch import nn

from visiontune.diffusion.timesteps import Timesteps
from visiontune.objectives import denoising, dreambooth
from visiontune.objectives.base import Tools, generator
from visiontune.weights.mixing import merged
from visiontune.weights.shares import search


def based(model) -> Tools:
    """Tools whose reference has the model's weights of now."""
    start = {name: value.clone() for name, value in model.denoiser.state_dict().items()}

    @contextmanager
    def reference():
        now = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
        model.denoiser.load_state_dict(start)
        try:
            yield
        finally:
            model.denoiser.load_state_dict(now)

    return Tools(reference=reference, rng=generator(3))


def again(tools: Tools) -> Tools:
    return replace(tools, rng=generator(3))


def test_nothing_is_apart_from_the_base_before_the_first_step():
    model, batch = TinyModel(), tiny_batch(TinyModel(), 0, 4)
    loss = denoising.build(denoising.Config(reference_weight=1.0)).loss(model, batch, based(model))
    plain = denoising.build(denoising.Config()).loss(model, batch, again(Tools()))
    torch.testing.assert_close(loss.total, plain.total, rtol=0, atol=0)


@pytest.mark.parametrize("embedded", [True, False])
def test_both_distances_are_of_the_same_noisy_latents(embedded):
    model = TinyModel()
    batch, tools = tiny_batch(model, 0, 3, embedded=embedded), based(model)
    base = TinyModel()
    with torch.no_grad():
        for parameter in [*model.denoiser.parameters(), *([] if embedded else model.encoder.parameters())]:
            parameter.add_(0.1)
    objective = denoising.build(denoising.Config(reference_weight=0.7))
    if not embedded:  # a trained text encoder is the base's again in the reference
        model.encoder.load_state_dict(base.encoder.state_dict())
    loss = objective.loss(model, batch, tools)
    t, eps = objective.noised(model, batch.data["image"], batch, again(tools))
    x_t = model.schedule.add_noise(batch.data["image"], eps, t)
    cond = model.embed(batch.prompts)
    pred, start = model.predict(x_t, t, cond), base.predict(x_t, t, base.embed(batch.prompts))
    near, far = (pred - eps).square().mean(), (pred - start).square().mean()
    torch.testing.assert_close(loss.total, near + 0.7 * far)


def test_it_is_asked_for_by_its_weight_alone():
    held = denoising.Config(reference_weight=0.1)
    assert not denoising.build(denoising.Config()).needs.reference and denoising.build(held).needs.reference
    options = {"prior": "pictures"}
    assert not dreambooth.build(dreambooth.Config(**options)).needs.reference
    assert dreambooth.build(dreambooth.Config(**options, reference_weight=0.1)).needs.reference
    assert dreambooth.build(dreambooth.Config()).needs.reference


def test_places_that_are_masked_out_stay_near_the_base_too():
    model = TinyModel()
    batch, tools = tiny_batch(model, 0, 2), based(model)
    batch = replace(batch, data={**batch.data, "mask": torch.zeros(2, 1, 8, 8)})
    with torch.no_grad():
        model.denoiser.last.bias.add_(0.5)
    errors = denoising.build(denoising.Config(reference_weight=2.0)).errors(model, batch, tools)
    torch.testing.assert_close(errors, torch.full((2,), 0.5))


# ---------------------------------------------------------------------------------------------------- a small world


class Points(nn.Module):
    """eps of points [b, 2, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x, t, tokens):
        level = t[:, None] / 1000
        return self.layers(torch.cat([x.flatten(1), level, level.square()], 1)).view_as(x)


def points(seed: int, count: int = 128):
    """Rows on a circle of two radii."""
    rng = generator("points", seed)
    angle = 6.2832 * torch.rand(count, generator=rng)
    radius = 0.5 + (torch.rand(count, generator=rng) < 0.5).float()
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1).view(-1, 2, 1, 1)
    return x


def train(model, objective, steps: int, tools: Tools) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.Adam(model.denoiser.parameters(), 5e-3)
    rows = tiny_batch(model, 0, 128)
    for step in range(steps):
        batch = replace(rows, data={"image": points(step)})
        optimizer.zero_grad()
        objective.loss(model, batch, replace(tools, rng=generator("t", step))).total.backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.denoiser.state_dict().items()}


@torch.no_grad()
def halves(model) -> torch.Tensor:
    """Held-out error of the lower and the upper half of the noise."""
    x, cond = points(-1, 600), model.embed([""] * 600)
    found = []
    for low in (0, 500):
        t = (low + 500 * torch.rand(600, generator=generator(low))).long()
        eps = torch.randn(x.shape, generator=generator("eps", low))
        found.append((model.predict(model.schedule.add_noise(x, eps, t), t, cond) - eps).square().mean())
    return torch.stack(found)


def test_experts_are_better_at_their_noise_and_merged_better_than_the_base():
    model = TinyModel(denoiser=Points())
    model.denoiser.requires_grad_(True)
    base = train(model, denoising.build(denoising.Config()), 40, Tools())
    before, own = halves(model), []
    for low in (0.0, 0.5):
        model.denoiser.load_state_dict(base)
        options = Timesteps(low=low, high=low + 0.5, global_share=0.3)
        own.append(
            train(model, denoising.build(denoising.Config(reference_weight=1.0, timesteps=options)), 200, based(model))
        )
        assert halves(model)[round(2 * low)] < 0.98 * before[round(2 * low)]

    def loss(shares):
        model.denoiser.load_state_dict(merged(base, own, shares))
        return float(halves(model).mean())

    best, tried = search(loss, 2, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert tried[best] < 0.98 * tried[0.0, 0.0]
    assert tried[best] < min(tried[1.0, 0.0], tried[0.0, 1.0]) and min(best) > 0
