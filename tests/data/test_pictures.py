"""How picture files are read, whoever reads them."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from visiontune.data import buckets, pictures
from visiontune.data.base import Source
from visiontune.errors import UserError

HALVES = np.zeros((8, 16, 3), np.uint8)
HALVES[:, :8], HALVES[:2] = (255, 0, 0), (0, 0, 255)  # a blue strip above red and black: no two turns look alike


def tagged(path, orientation, values=HALVES):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(values).save(path, exif=exif)
    return path


# ---------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg", ".avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_turns_the_picture_and_its_size_alike(tmp_path, suffix, orientation):
    path = tagged(tmp_path / f"a{suffix}", orientation)
    upright = Image.fromarray(HALVES)
    turned = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM}
    turned |= {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270}
    turned |= {7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
    if orientation in turned:
        upright = upright.transpose(turned[orientation])
    found = pictures.read(path)
    assert pictures.size(path) == (found.height, found.width) == (upright.height, upright.width)
    if suffix in (".png", ".tif"):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(upright))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(tmp_path, suffix, orientation):
    path = tagged(tmp_path / f"a{suffix}", orientation)
    assert pictures.size(path) == (8, 16) and pictures.read(path).size == (16, 8)


def test_exif_that_cannot_be_read_is_no_reason_to_refuse_a_picture(tmp_path):
    Image.fromarray(HALVES).save(tmp_path / "a.png", exif=b"Exif\0\0 this is none")
    assert pictures.size(tmp_path / "a.png") == (8, 16) and pictures.read(tmp_path / "a.png").size == (16, 8)


def test_a_portrait_kept_as_tiff_goes_into_the_portrait_bucket(tmp_path):
    path = tagged(tmp_path / "a.tif", 6, np.zeros((96, 192, 3), np.uint8))
    height, width = buckets.nearest(Source(path).size(), buckets.sizes(128, 4))
    assert height > width


def test_a_picture_without_a_file_is_read_by_the_same_rules(tmp_path):
    picture = Image.open(io.BytesIO(tagged(tmp_path / "a.png", 6).read_bytes()))
    assert Source(lambda: picture).size() == (16, 8)
    assert Source(lambda: Image.new("L", (3, 5))).size() == (5, 3)


# ---------------------------------------------------------------------------------------------------- transparency


def test_transparency_is_flattened_on_white():
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    picture.putpixel((1, 0), (200, 0, 0, 255))
    flat = pictures.upright_rgb(picture)
    assert flat.mode == "RGB"
    assert [flat.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 0, 0)]


@pytest.mark.parametrize(
    ("bits", "kind", "values", "clear", "expected"),
    [
        (16, 2, (65535, 32768, 256, 20000, 0, 65535), None, [(255, 128, 1), (78, 0, 255)]),
        (16, 6, (65535, 32768, 256, 65535, 20000, 0, 65535, 0), None, [(255, 128, 1), (255, 255, 255)]),
        (16, 4, (20000, 65535, 20000, 0), None, [(78, 78, 78), (255, 255, 255)]),
        (8, 2, (9, 9, 9, 1, 2, 3), (1, 2, 3), [(9, 9, 9), (255, 255, 255)]),
        (8, 0, (7, 100), (100,), [(7, 7, 7), (255, 255, 255)]),
    ],
)
def test_colours_of_sixteen_bits_and_transparent_levels_of_png(tmp_path, bits, kind, values, clear, expected):
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    body = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, kind, 0, 0, 0))
    body += chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    row = struct.pack(f">{len(values)}{'H' if bits == 16 else 'B'}", *values)
    whole = b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(whole)
    assert [tuple(pixel) for pixel in np.asarray(pictures.read(tmp_path / "a.png"))[0].tolist()] == expected


def test_palette_transparency_is_flattened_on_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([9, 9, 9, 10, 200, 30])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "a.png", transparency=0)
    flat = pictures.read(tmp_path / "a.png")
    assert [flat.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 200, 30)]


def test_the_transparent_level_of_a_deep_grey_is_white(tmp_path):
    Image.fromarray(np.array([[20000, 300]], np.uint16)).save(tmp_path / "a.png", transparency=300)
    flat = pictures.read(tmp_path / "a.png")
    assert [flat.getpixel((x, 0)) for x in (0, 1)] == [(78,) * 3, (255,) * 3]


# ---------------------------------------------------------------------------------------------------- depth


def test_sixteen_bit_grey_is_scaled_rather_than_clipped(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(pictures.read(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_byte_orders_of_sixteen_bits_are_one(mode):
    values = np.array([[0, 300, 32768, 65535]], ">u2" if mode == "I;16B" else "<u2")
    picture = Image.frombytes(mode, (4, 1), values.tobytes())
    assert np.asarray(pictures.eight_bits(picture))[0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
        (np.array([[0, 200, 100]], np.int32), [0, 1, 0]),  # sixteen bits, however dark
        (np.array([[0, 2**20, 2**21]], np.int32), [0, 128, 255]),
        (np.array([[-100, 65535]], np.int32), [0, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 128, 255]], np.float32), [0, 128, 255]),
        (np.array([[0, 32768, 65535]], np.float32), [0, 128, 255]),
        (np.array([[0, 1e6]], np.float32), [0, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.zeros((1, 2), np.float32), [0, 0]),
    ],
)
def test_whole_and_real_numbers_are_scaled_by_the_white_that_they_need(tmp_path, values, expected):
    assert np.asarray(pictures.eight_bits(Image.fromarray(values)))[0].tolist() == expected
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(pictures.read(tmp_path / "a.tif"))[0, :, 0].tolist() == expected


def test_values_that_are_no_numbers_are_refused(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif is not a readable image \(it has values that are not finite\)"):
        pictures.read(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_of_eight_bits_are_converted_and_not_scaled(mode):
    grey = Image.new("L", (2, 1), 255)
    assert np.asarray(pictures.upright_rgb(grey.convert("RGB").convert(mode)))[0, 0].tolist() == [255] * 3


# ---------------------------------------------------------------------------------------------------- masks


def test_a_mask_is_white_where_something_counts():
    def first(picture) -> list[int]:
        return np.asarray(pictures.mask(picture))[0].tolist()

    assert first(Image.fromarray(np.array([[0, 100, 255]], np.uint8))) == [0, 100, 255]
    assert first(Image.fromarray(np.array([[False, True]]))) == [0, 255]
    assert first(Image.fromarray(np.array([[0, 1, 1]], np.uint8))) == [0, 255, 255]
    assert first(Image.fromarray(np.array([[0, 65535]], np.uint16))) == [0, 255]
    clear = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    clear.putpixel((1, 0), (255, 255, 255, 255))
    assert first(clear) == [0, 255]


def test_the_source_of_a_mask_is_read_as_one(tmp_path):
    path = tagged(tmp_path / "a.png", 6)
    mask = Source(path, "mask")
    assert mask.open().mode == "L" and mask.open().size == (8, 16) and mask.size() == (16, 8)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("L"))
    for found in (mask, Source(lambda: Image.open(path), "mask")):
        np.testing.assert_array_equal(np.asarray(found.open()), expected)


# ---------------------------------------------------------------------------------------------------- files


def test_a_picture_is_whatever_pillow_opens_and_is_not_hidden(tmp_path):
    for name in (
        "a.png",
        "B.JPG",
        "c.jfif",
        "d.tga",
        "e.jp2",
        "f.avif",
        "g.webp",
        "h.ppm",
        "i.qoi",
        "._a.png",
        "j.txt",
    ):
        Image.fromarray(HALVES).save(tmp_path / name, "JPEG" if name in ("c.jfif", "j.txt", "B.JPG") else None)
    found = [f.name for f in pictures.in_folder(tmp_path)]
    assert found == ["B.JPG", "a.png", "c.jfif", "d.tga", "e.jp2", "f.avif", "g.webp", "h.ppm", "i.qoi"]
    assert all(pictures.read(tmp_path / name).size == (16, 8) for name in found)
    assert {".heic", ".eps", ".mpg", ".pdf", ".svg"}.isdisjoint(pictures.suffixes())


def test_a_picture_that_this_pillow_cannot_decode_is_none(monkeypatch):
    from PIL import features

    monkeypatch.setattr(features, "check", lambda codec: codec != "avif")
    pictures.suffixes.cache_clear()
    assert ".avif" not in pictures.suffixes() and ".webp" in pictures.suffixes()
    pictures.suffixes.cache_clear()


def test_heif_is_opened_where_its_package_is_installed(monkeypatch):
    opened = []
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: opened.append(1)))
    pictures._open_heif()
    assert opened == [1]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    pictures._open_heif()


@pytest.mark.parametrize("read", [pictures.read, pictures.read_mask, pictures.size])
def test_what_is_no_picture_is_one_line_with_its_name(tmp_path, read):
    (tmp_path / "a.png").write_text("<html>\n</html>")
    for name in ("a.png", "gone.png"):
        with pytest.raises(UserError, match=rf"{name} is not a readable image \(.+\): make it again") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_truncated_picture_is_refused(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match=r"a\.jpg is not a readable image"):
        pictures.read(path)
