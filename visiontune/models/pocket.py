"""The models that ship with visiontune: `pocket/sd` is the folder `visiontune/assets/pocket-sd`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from visiontune.errors import UserError
from visiontune.schema import nearest

PREFIX = "pocket/"
PIPELINE = "model_index.json"  # what every diffusers pipeline has


def names(*indices: str) -> list[str]:
    """The pocket models of this installation whose folder holds one of these files, as `pocket/sd`; by default those
    that are pipelines."""
    found = {path.parent.name for index in indices or (PIPELINE,) for path in _assets().glob(f"pocket-*/{index}")}
    return sorted(PREFIX + name.removeprefix("pocket-") for name in found)


def folder(name: str, *indices: str) -> Path:
    """The folder of one of the pocket models that :func:`names` lists.

    Raises:
        UserError: this installation has none of that name.
    """
    if name not in names(*indices):
        mend = nearest(name, names(*indices)) or ": this installation lacks its assets, so install visiontune again"
        raise UserError(f"there is no pocket model '{name}'{mend}")
    return _assets() / f"pocket-{name.removeprefix(PREFIX)}"


def _assets() -> Path:
    return Path(str(files("visiontune") / "assets"))
