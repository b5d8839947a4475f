"""Which family the names of a file's layers are of: for the message where they are not of the model at hand."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable


def likely(names: Iterable[str]) -> list[str]:
    """The families that know the blocks of most of the names; several where they share them, and none if nobody does.

    Args:
        names: of layers as files have them, with dots or underscores.
    """
    package = __name__.rpartition(".")[0]
    names, found = list(names), dict[str, int]()
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name.startswith("_"):
            continue
        if blocks := importlib.import_module(f"{package}.{module.name}").Keys.in_blocks():
            # Single blocks are others than blocks.
            pattern = re.compile("|".join(rf"(?:^|(?<!single)[._]){block}" for block in blocks))
            found[module.name] = sum(pattern.search(name) is not None for name in names)
    most = max(found.values(), default=0)
    return [family for family, count in found.items() if count == most > 0]
