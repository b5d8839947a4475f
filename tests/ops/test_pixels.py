"""Bytes to floats and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from visiontune.ops.pixels import Framing, to_tensor, to_uint8

EVERY = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(16, 4, 3), (5, 16, 4, 3), (2, 5, 16, 4, 3)])
def test_pictures_come_back_as_they_were(shape):
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    tensor = to_tensor(pictures)
    assert tensor.shape == (*shape[:-3], 3, 16, 4) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor[..., 1, 7, 2].numpy() == pytest.approx(pictures[..., 7, 2, 1] / 255)
    assert np.array_equal(to_uint8(tensor), pictures)


def test_scaled_to_both_signs_every_value_is_the_nearest_float():
    scaled = to_tensor(EVERY.reshape(16, 16, 1)).flatten() * 2 - 1
    assert torch.equal(scaled, torch.arange(256.0) / 127.5 - 1)
    assert (float(scaled.min()), float(scaled.max())) == (-1.0, 1.0)


def test_a_picture_is_read_whatever_its_strides():
    picture = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    assert torch.equal(to_tensor(picture[::-1, ::2]), to_tensor(picture).flip(-2)[..., ::2])


def test_floats_are_rounded_and_clamped():
    values = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.2]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_what_is_resized_stays_in_range_and_keeps_the_gradient_of_saturated_pixels():
    picture = torch.zeros(1, 3, 12, 12, dtype=torch.float64)
    picture[..., 4:8, 3:9] = 1
    for size in (7, 31):
        images = (1.1 * picture).requires_grad_()
        resized = Framing(size=size, crop=size)(images)
        plain = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
        assert plain.min() < -0.01 and plain.max() > 1.1
        assert resized.min() >= -1e-12 and resized.max() <= 1 + 1e-12
        weights = torch.randn(resized.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (found,), (expected,) = (torch.autograd.grad((weights * x).sum(), images) for x in (resized, plain))
        torch.testing.assert_close(found, expected)
    # What is not resized is left as it is.
    assert torch.equal(Framing(size=12, crop=12)(1.1 * picture.float()), 1.1 * picture.float())
