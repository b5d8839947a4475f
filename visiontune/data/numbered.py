"""Pictures of datasets of the catalogue by their numbers: pocket/mallow/0."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from visiontune import catalogue
from visiontune.data import pictures
from visiontune.data.base import Config
from visiontune.data.readers import read
from visiontune.errors import UserError


def picture(name: str) -> Image.Image | None:
    """The picture in RGB; None where a file is meant.

    Raises:
        UserError: the dataset has no picture of that number.
    """
    dataset, _, number = name.rpartition("/")
    if not number.isdecimal() or dataset not in catalogue.names("datasets") or Path(name).exists():
        return None
    samples = read(Config(root=dataset))
    if int(number) >= len(samples):
        raise UserError(f"{name}: {dataset} has pictures 0 to {len(samples) - 1}")
    return pictures.upright_rgb(samples[int(number)].sources["image"].open())
