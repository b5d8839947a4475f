"""The formats of other tools: one file a format, which is called as the format.

A file ``<format>.py`` defines

- ``FOLDER``: whether a folder is written, otherwise a ``.safetensors`` file;
- ``check(changes, job)``: which raises a :class:`~visiontune.errors.UserError` where the format cannot hold the
  :class:`~visiontune.weights._sets.Changes` of attached sets, without a mend: the formats that can are asked for;
- ``write(changes, path, job)``: which writes what was checked as the :class:`~visiontune.weights.export.Job` says,
  whole or not at all, and returns what it wrote (:class:`~visiontune.weights.export.Exported`).
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from visiontune.errors import UserError


def names() -> list[str]:
    """Every format, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a format.

    Raises:
        UserError: there is none of that name.
    """
    if name not in names():
        raise UserError(f"unknown format '{name}'; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
