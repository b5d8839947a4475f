"""The one way in which picture files are read: for training, for scores, for references, for what was drawn before.

A picture comes out upright (by its EXIF orientation), with transparency flattened on white, as eight-bit RGB. Greys of
more than eight bits are scaled, never clipped: see :func:`eight_bits`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageSequence, features

from visiontune.errors import UserError

# What holds one picture. Pillow opens more: vector graphics, films, scientific grids, fonts of cursors.
_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "HEIF", "JPEG2000", "TGA", "PPM"),
    *("QOI", "PSD", "PCX", "SGI"),
)
_CODECS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000", "JPEG": "jpg"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WIDTH, _LENGTH = 256, 257  # tags of a TIFF file: its size as it is stored


def _open_heif() -> None:
    """Have Pillow open HEIF where pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


_open_heif()


@functools.cache
def suffixes() -> tuple[str, ...]:
    """Endings of the picture files that the installed Pillow opens, with their dots, in lower case."""
    known = Image.registered_extensions()
    usable = {f for f in _FORMATS if f in Image.OPEN and (f not in _CODECS or features.check(_CODECS[f]))}
    return tuple(sorted(suffix for suffix, kind in known.items() if kind in usable))


def is_picture(file: Path) -> bool:
    """Whether a file's name is that of a picture; hidden files (``._1.png`` of macOS) are none."""
    return file.suffix.lower() in suffixes() and not file.name.startswith(".")


def in_folder(folder: Path) -> list[Path]:
    """The picture files that lie in a folder, in the order of their names."""
    return sorted(f for f in folder.iterdir() if is_picture(f) and f.is_file())


def read(file: Path | IO[bytes]) -> Image.Image:
    """The whole picture: decoded, upright, RGB.

    Raises:
        UserError: the file is missing, truncated or no picture.
    """
    try:
        with Image.open(file) as picture:
            return upright_rgb(picture)
    except Exception as error:  # a damaged file can raise nearly anything from inside a decoder
        raise _unreadable(file, error) from error


def frames(file: Path | IO[bytes]) -> np.ndarray:
    """What the file shows: ``uint8 [h, w, 3]`` as :func:`read` makes it, or all frames of a clip ``[f, h, w, 3]``.

    Raises as :func:`read`.
    """
    try:
        with Image.open(file) as picture:
            count = getattr(picture, "n_frames", 1)
            shown = [np.asarray(upright_rgb(frame)) for frame in ImageSequence.Iterator(picture)] if count > 1 else []
            return np.stack(shown) if shown else np.asarray(upright_rgb(picture))
    except Exception as error:
        raise _unreadable(file, error) from error


def count(file: Path) -> int:
    """How many frames or pages a picture has, from its header. Raises as :func:`read`."""
    try:
        with Image.open(file) as picture:
            return getattr(picture, "n_frames", 1)
    except Exception as error:
        raise _unreadable(file, error) from error


def frame(file: Path, index: int) -> Image.Image:
    """One frame of a clip, as :func:`frames` has it."""
    return Image.fromarray(frames(file)[index])


def read_mask(file: Path) -> Image.Image:
    """A whole mask, as :func:`mask` makes it of a picture. Raises as :func:`read`."""
    try:
        with Image.open(file) as picture:
            return mask(picture)
    except Exception as error:
        raise _unreadable(file, error) from error


def size(file: Path) -> tuple[int, int]:
    """Height and width of the upright picture, from the file's header alone. Raises as :func:`read`."""
    try:
        with Image.open(file) as picture:
            # Pillow has turned a TIFF's size already, or not, by its version.
            tags: Any = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
            width, height = tags.get(_WIDTH, picture.width), tags.get(_LENGTH, picture.height)
            return (width, height) if _orientation(picture) >= 5 else (height, width)
    except Exception as error:
        raise _unreadable(file, error) from error


def upright_rgb(picture: Image.Image) -> Image.Image:
    """A picture decoded, turned as its EXIF orientation says, flattened on white and in eight-bit RGB."""
    picture = eight_bits(_upright(picture))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def mask(picture: Image.Image) -> Image.Image:
    """A picture as a mask: upright, eight-bit grey, white where something counts.

    Transparent places count nothing. A mask whose greatest value is 1 holds zeros and ones, which become black and
    white.
    """
    picture = eight_bits(_upright(picture))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    picture = picture.convert("L")
    if picture.getextrema() in ((0, 1), (1, 1)):
        picture = picture.point(lambda value: 255 * value)
    return picture


def eight_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of more than eight bits scaled to eight; any other as it is.

    Black is 0, or the least value where that is below 0. White is, of sixteen-bit pictures (``I;16``), 65535; of whole
    numbers (``I``) 65535, or the greatest value where that is above it; of real numbers (``F``) the first of 1, 255 and
    65535 that no value exceeds, or the greatest value where all are exceeded.

    Raises:
        ValueError: real numbers that are not finite.
    """
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture)
    if picture.mode.startswith("I;16"):
        grey = (values >> 8).astype(np.uint8)
    else:
        if not np.isfinite(values).all():
            raise ValueError("it has values that are not finite")
        low, high = min(float(values.min()), 0.0), float(values.max())
        whites = (65535.0,) if picture.mode == "I" else (1.0, 255.0, 65535.0)
        white = next((white for white in whites if high <= white), high)
        grey = np.rint((values.astype(np.float64) - low) / (white - low) * 255).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey)


def _upright(picture: Image.Image) -> Image.Image:
    # Pillow turns some formats itself while it decodes, and takes the orientation away with it.
    picture.load()
    turn = _TURNS.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation in 1..8; 1 where there is none, or none that is allowed, or EXIF that cannot be read."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # what a camera or an editor wrote there is no reason to refuse the picture
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _unreadable(file: Path | IO[bytes], error: Exception) -> UserError:
    name = file if isinstance(file, Path) else getattr(file, "name", "what was packed")
    why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{name} is not a readable image ({why[:200]}): make it again or delete it")
