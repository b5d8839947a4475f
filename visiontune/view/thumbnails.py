"""Small pictures inside of a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from visiontune.data import pictures


def thumbnail(file: Path, side: int) -> str:
    """A picture as a data URI, no side longer than `side` pixels; a small one as it is.

    Raises:
        UserError: the file is no picture.
    """
    shown = pictures.read(file)
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    held = io.BytesIO()
    # Pictures of pocket models are smaller without loss than with.
    shown.save(held, format="WEBP", lossless=max(shown.size) <= 64, quality=85, method=2)
    return f"data:image/webp;base64,{base64.b64encode(held.getvalue()).decode()}"
