"""The models that ship with visiontune: `pocket/sd` is the folder `visiontune/assets/pocket-sd`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from visiontune.errors import UserError
from visiontune.schema import nearest

PREFIX = "pocket/"
PIPELINE = "model_index.json"  # what every diffusers pipeline has


def names(index: str = PIPELINE) -> list[str]:
    """The pocket models of this installation whose folder holds the file ``index``, as `pocket/sd`."""
    indices = _assets().glob(f"pocket-*/{index}")
    return sorted(PREFIX + index.parent.name.removeprefix("pocket-") for index in indices)


def folder(name: str, index: str = PIPELINE) -> Path:
    """The folder of a pocket model that holds ``index``; UserError where this installation has none of that name."""
    if name not in names(index):
        mend = nearest(name, names(index)) or ": this installation lacks its assets, so install visiontune again"
        raise UserError(f"there is no pocket model '{name}'{mend}")
    return _assets() / f"pocket-{name.removeprefix(PREFIX)}"


def _assets() -> Path:
    return Path(str(files("visiontune") / "assets"))
