"""Image files, whole or absent. A clip is an animated PNG, whose first frame other programs show."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visiontune import files
from visiontune.errors import UserError
from visiontune.sampling.metadata import Metadata

# WebP at effort 0 is five to six times faster than default PNG, and every bit as exact. A JPEG keeps its
# colours at full size: what is halved by default is seen at edges.
_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True, "method": 0, "quality": 0},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}

_FRAME = 125  # milliseconds; a clip does not say how fast it is


def write_image(
    path: Path, image: np.ndarray | Image.Image, *, quality: int | None = None, metadata: Metadata | None = None
) -> str:
    """Write an image ``uint8 [h, w, 3]`` atomically, the suffix choosing the format; returns the file's sha256.

    A clip ``[f, h, w, 3]`` becomes an animation in which every frame is kept, also one like that before it.

    Args:
        path: ends in ``.png`` or ``.webp``, both without loss, or in ``.jpg``.
        quality: 1 to 100, of a lossy WebP or a JPEG. metadata: what it was made with.

    Raises:
        ValueError: another suffix.
        UserError: a clip, and the suffix is not ``.png``; or it cannot be written.
    """
    suffix = path.suffix.removeprefix(".")
    if suffix not in _OPTIONS:
        raise ValueError(f"images are written as {' or '.join(_OPTIONS)}, not '{suffix}'")
    picture, options = image, dict(_OPTIONS[suffix])
    if quality is not None:
        options |= {"quality": quality, **({"lossless": False, "method": 4} if suffix == "webp" else {})}
    if not isinstance(picture, Image.Image):
        first, *others = [Image.fromarray(frame) for frame in (picture if picture.ndim == 4 else picture[None])]
        picture = first
        if others:
            # WebP melts equal frames together.
            if suffix != "png":
                raise UserError(f"clips are written as animated png, not as {suffix}: set format=png")
            options |= _animation(others)
    if metadata is not None:
        options |= metadata.options(options["format"])
    with files.atomic_write(path) as temporary:
        picture.save(temporary, **options)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    return digest


def _animation(others: list[Image.Image]) -> dict[str, Any]:
    """How Pillow is to write the frames after the first."""
    # It leaves out a frame that is equal to the last and blended alike; without transparency both ways are the same.
    blend = [i % 2 for i in range(len(others) + 1)]
    return {"save_all": True, "append_images": others, "duration": _FRAME, "loop": 0, "blend": blend}
