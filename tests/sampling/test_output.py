"""Image files and sheets."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visiontune.errors import UserError
from visiontune.sampling.grid import grid
from visiontune.sampling.writer import write_image


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_writer_is_lossless_and_returns_the_file_hash(tmp_path: Path, suffix: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    assert write_image(path, image) == hashlib.sha256(path.read_bytes()).hexdigest()
    with Image.open(path) as read:
        assert read.format == suffix.upper()
        np.testing.assert_array_equal(np.asarray(read.convert("RGB")), image)


def test_writer_refuses_other_formats_and_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="png or webp or jpg"):
        write_image(tmp_path / "a.gif", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError):
        # A WebP side is at most 16383 pixels: the encoder fails after the file was opened.
        write_image(tmp_path / "a.webp", np.zeros((1, 16384, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, image = tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8)
    write_image(path, image)
    before = path.read_bytes()

    def half(self: Image.Image, file: Path, **options: object) -> None:
        file.write_bytes(before[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        write_image(path, image + 1)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_grid_puts_images_in_reading_order() -> None:
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = grid([np.full((10, 10, 3), color, np.uint8) for color in colors], 2, cell=20, gap=2)
    assert sheet.size == (2 * 22 + 2, 2 * 22 + 2)
    centres = [(12, 12), (34, 12), (12, 34), (34, 34)]
    assert [sheet.getpixel(xy) for xy in centres] == [*colors, (255, 255, 255)]


def test_grid_captions_leave_pictures_untouched() -> None:
    black = Image.new("RGB", (64, 64))
    sheet = grid([black] * 4, 2, captions=["w" * 30] * 4, row_captions=["one", "two"], column_captions=["x", "y"])
    pixels = np.asarray(sheet)
    # A 64-pixel picture is shown at 128; nothing but the four pictures is a solid black square.
    solid = (pixels == 0).all(-1)
    assert solid[:, 164:].sum() >= 4 * 128 * 128
    assert not solid[:16, :160].any()
    assert solid[16:, :160].any(), "row captions are drawn left of the pictures"


def test_grid_fits_other_shapes_without_distortion() -> None:
    sheet = grid([Image.new("RGB", (40, 20))], 1, cell=40, gap=0)
    dark = (np.asarray(sheet) == 0).all(-1)
    assert dark.sum() == 40 * 20
    assert dark[10:30].all()


def test_grid_refuses_what_does_not_fit() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="at least one image"):
        grid([], 2)
    with pytest.raises(UserError, match="needs 2 row_captions, not 1"):
        grid([picture] * 3, 2, row_captions=["a"])
