"""The diffusion models that ship with visiontune: `pocket/sd` is the folder `visiontune/assets/pocket-sd`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from visiontune.errors import UserError
from visiontune.schema import nearest

PREFIX = "pocket/"


def names() -> list[str]:
    """The pocket diffusion models of this installation, as `pocket/sd`."""
    indices = _assets().glob("pocket-*/model_index.json")
    return sorted(PREFIX + index.parent.name.removeprefix("pocket-") for index in indices)


def folder(name: str) -> Path:
    """The folder of a pocket model. Raises UserError where this installation has none of that name."""
    if name not in names():
        mend = nearest(name, names()) or ": this installation lacks its assets, so install visiontune again"
        raise UserError(f"there is no pocket model '{name}'{mend}")
    return _assets() / f"pocket-{name.removeprefix(PREFIX)}"


def _assets() -> Path:
    return Path(str(files("visiontune") / "assets"))
