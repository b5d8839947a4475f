from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from visiontune.data.transforms import to_mask, to_pixels


def test_pixels_of_an_image_that_fits_are_its_own_scaled_to_minus_one_and_one():
    values = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
    pixels = to_pixels(Image.fromarray(values), (4, 6))
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), values / 127.5 - 1, atol=1e-6)


def test_a_wide_image_is_cropped_in_its_middle_or_where_asked():
    values = np.zeros((8, 24, 3), np.uint8)
    values[:, 8:16] = 255
    picture = Image.fromarray(values)
    assert (to_pixels(picture, (8, 8)) == 1).all()
    assert (to_pixels(picture, (8, 8), centering=(0.0, 0.5)) == -1).all()


def test_flip_mirrors_left_to_right():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    assert torch.equal(to_pixels(picture, (8, 8), flip=True), to_pixels(picture, (8, 8)).flip(-1))


# ---------------------------------------------------------------------------------------------------- masks


def test_a_mask_is_the_mean_over_each_latent_pixel():
    values = np.random.default_rng(0).integers(0, 256, (8, 12), np.uint8)
    mask = to_mask(Image.fromarray(values), (8, 12), 4)
    assert mask.shape == (1, 2, 3) and mask.dtype == torch.float32
    means = values.reshape(2, 4, 3, 4).mean((1, 3)) / 255
    np.testing.assert_allclose(mask[0].numpy(), means, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 60), (61, 24), (16, 16), (48, 48)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("centering", [(0.5, 0.5), (0.1, 0.9)])
def test_a_mask_is_cropped_and_flipped_as_its_picture_is(shape, flip, centering):
    """Of a picture that is white where its mask is, the latents' mean follows the mask."""
    values = np.zeros(shape, np.uint8)
    values[3 : shape[0] // 2, shape[1] // 3 :] = 255
    picture = Image.fromarray(values)
    options = {"flip": flip, "centering": centering}
    mask = to_mask(picture, (16, 24), 4, **options)
    pixels = to_pixels(picture.convert("RGB"), (16, 24), **options)
    seen = torch.nn.functional.avg_pool2d(pixels[None, :1] / 2 + 0.5, 4)[0]
    assert (mask - seen).abs().max() < 0.07  # one filter rings, the other does not
