"""The denoising loss on held-out pictures."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny import tiny_model

from visiontune.data.base import Config, Sample, Source
from visiontune.data.rows import Rows
from visiontune.objectives.base import generator
from visiontune.training.held import Held


def pictures(count: int) -> list[Sample]:
    colors = [(40 * i, 255 - 40 * i, 90) for i in range(count)]
    return [
        Sample(id=f"p{i}", sources={"image": Source(lambda c=color: Image.new("RGB", (16, 16), c))}, caption="a circle")
        for i, color in enumerate(colors)
    ]


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_it_is_the_mean_error_at_fixed_noise_and_does_not_depend_on_the_batch(family, tmp_path):
    model = tiny_model(family)
    rows = Rows(model, pictures(3), Config(root="x"), tmp_path)
    held = Held(rows, 3, levels=4, batch_size=3)
    found = held.losses(model)
    torch.testing.assert_close(found, Held(rows, 3, levels=4, batch_size=2).losses(model), rtol=1e-4, atol=1e-6)
    assert torch.equal(found, held.losses(model))
    batch = held.batches[0]
    x_0, errors = batch.data["image"].float(), []
    for level, share in enumerate((0.125, 0.375, 0.625, 0.875)):
        t = torch.tensor([share * 1000] * 3) if family == "sd3" else torch.tensor([int(share * 1000)] * 3)
        eps = torch.stack([torch.randn(x_0.shape[1:], generator=generator("held", f"p{i}", level)) for i in range(3)])
        with torch.no_grad():
            pred = model.predict(model.schedule.add_noise(x_0, eps, t), t, batch.cond)
        errors.append((pred - model.schedule.target(x_0, eps, t)).square().mean().double())
    torch.testing.assert_close(found, torch.stack(errors), rtol=1e-4, atol=1e-6)
