"""Inpaint: what is kept, what is drawn, and the masks that it takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from visiontune.data.base import Config as Data
from visiontune.data.readers import read
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Keep, Start, rollout
from visiontune.errors import UserError
from visiontune.guidance import cfg, inpaint
from visiontune.guidance._pictures import check_mask, check_picture, fitted, mask_of
from visiontune.guidance.base import Point, Run
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


def test_a_mask_of_another_ratio_is_refused():
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(UserError, match="the mask has 16x8 pixels, which is another ratio"):
        mask_of(
            Image.new("L", (16, 8), 255),
            Point(x=x, t=torch.zeros(1), levels=[0.0], schedule=Schedule.flow()),
            "inpaint",
        )


def test_a_mask_may_be_a_rectangle_of_pixels():
    made = tiny_model("sd3")
    side = made.downsample
    x = torch.zeros(1, 4, 4, 8)
    point = Point(x=x, t=torch.zeros(1), levels=[0.0], schedule=Schedule.flow(), run=Run(model=made))
    found = mask_of([side + 1, side, side, 1], point, "inpaint")
    expected = torch.zeros(1, 1, 4, 8)
    expected[..., 1, 1:3] = 1  # a latent of which one column of pixels is white is white, too
    assert torch.equal(found, expected)
    with pytest.raises(UserError, match=f"ends outside of the {8 * side}x{4 * side} that are drawn"):
        mask_of([0, 0, side, 4 * side + 1], replace(point, memory={}), "inpaint")


@pytest.mark.parametrize(
    ("mask", "told"),
    [([1, 2, 3], "left, top, width and height"), ([0, 0, 0, 4], "needs a width"), ([0, -1, 4, 4], "begins within")],
)
def test_what_is_no_rectangle_is_refused(mask, told):
    with pytest.raises(UserError, match=told):
        check_mask(mask, "inpaint")


def test_a_picture_may_be_one_of_a_dataset_of_the_catalogue():
    shown = np.asarray(read(Data(root="pocket/mallow"))[1].sources["image"].open())
    check_picture("pocket/mallow/1", "inpaint")
    assert np.array_equal(fitted("pocket/mallow/1", 2, (4, 32, 32), "inpaint"), shown)
    with pytest.raises(UserError, match="picture pocket/mallow/5: pocket/mallow has pictures 0 to 4"):
        check_picture("pocket/mallow/5", "inpaint")
