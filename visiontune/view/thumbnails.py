"""Small pictures inside of a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import IO

from PIL import Image

from visiontune.data import pictures


def thumbnail(file: Path | IO[bytes], side: int, *, exact: bool = True) -> str:
    """A picture as a data URI, no side longer than `side` pixels; up to 64 pixels without loss where `exact`.

    Raises:
        UserError: the file is no picture.
    """
    shown = pictures.read(file)
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    held = io.BytesIO()
    # Without loss pictures of pocket models take about five times the room.
    shown.save(held, format="WEBP", lossless=exact and max(shown.size) <= 64, quality=85, method=2)
    return f"data:image/webp;base64,{base64.b64encode(held.getvalue()).decode()}"
