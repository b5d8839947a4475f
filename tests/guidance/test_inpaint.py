"""Inpaint: what is kept, what is drawn, and the masks that it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Keep, Start, rollout
from visiontune.errors import UserError
from visiontune.guidance import cfg, inpaint
from visiontune.guidance._pictures import mask_of
from visiontune.guidance.base import Point
from visiontune.guidance.stack import GuidanceStack

PICTURE = Image.linear_gradient("L").resize((16, 16)).convert("RGB")


def half():
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    return mask


def test_the_rest_is_the_picture_at_every_level_and_to_the_bit_at_the_end():
    made = tiny_model("sd3")
    stack = GuidanceStack([cfg.Config(scale=3.0), inpaint.Config(picture=PICTURE, mask=half())])
    noise = torch.randn(2, *made.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trajectory = rollout(
            made,
            made.embed(["a red circle", "a star"]),
            guidance=stack,
            chain=4,
            start=Start(latents=noise),
            keep=Keep(history=True),
        )
        pixels = torch.from_numpy(np.asarray(PICTURE)).permute(2, 0, 1)[None] / 127.5 - 1
        clean = made.encode(pixels, sample=False)
    half_way = made.latent_shape()[-1] // 2
    for i, t in enumerate([*trajectory.timesteps.tolist(), 0.0]):
        known = (1 - t / 1000) * clean + t / 1000 * noise
        torch.testing.assert_close(trajectory.latents[:, i, :, :, half_way:], known[..., half_way:], rtol=0, atol=1e-6)
    final = trajectory.final
    assert torch.equal(final[..., half_way:], clean.expand_as(final)[..., half_way:])
    assert (final - clean)[..., :half_way].abs().min(0).values.max() > 0.1


@pytest.mark.parametrize("side", [8, 16, 64])
def test_no_white_of_a_mask_is_lost(side):
    mask = Image.new("L", (side, side))
    mask.putpixel((side - 1, 0), 255)
    x = torch.zeros(1, 4, 8, 8)
    found = mask_of(mask, Point(x=x, t=torch.zeros(1), levels=[0.0], schedule=Schedule.flow()), "inpaint")
    expected = torch.zeros(1, 1, 8, 8)
    expected[..., 0, 7] = 1
    assert torch.equal(found, expected)


def test_a_mask_without_white_is_refused():
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(UserError, match="inpaint: the mask is black everywhere"):
        mask_of(Image.new("L", (8, 8)), Point(x=x, t=torch.zeros(1), levels=[0.0], schedule=Schedule.flow()), "inpaint")
