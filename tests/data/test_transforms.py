from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from visiontune.data.base import Sample
from visiontune.data.transforms import to_pixels, upright_rgb


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


def test_exif_orientation_turns_the_picture_and_its_size(tmp_path):
    values = np.zeros((8, 16, 3), np.uint8)
    values[:, :8] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: left becomes top
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    sample = Sample(id="a", image=tmp_path / "a.png", caption="x")
    picture = sample.open()
    assert picture.size == (8, 16)
    assert sample.size() == (16, 8)
    assert (np.asarray(picture)[:8] == 255).all() and (np.asarray(picture)[8:] == 0).all()


def test_size_of_a_picture_without_a_file_is_height_and_width():
    assert Sample(id="a", image=lambda: Image.new("RGB", (3, 5)), caption="x").size() == (5, 3)


def test_transparency_is_flattened_on_white():
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    picture.putpixel((1, 0), (200, 0, 0, 255))
    flat = upright_rgb(picture)
    assert flat.mode == "RGB"
    assert [flat.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 0, 0)]


def test_palette_transparency_is_flattened_on_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([9, 9, 9, 10, 200, 30])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "a.png", transparency=0)
    with Image.open(tmp_path / "a.png") as opened:
        flat = upright_rgb(opened)
    assert [flat.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 200, 30)]


def test_sixteen_bit_grey_is_scaled_rather_than_clipped(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        flat = upright_rgb(opened)
    assert [flat.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
