"""Adapters: trainable changes of a frozen model's layers, one file per method.

``attach(unet, "oft", rank=...)`` returns an :class:`~visiontune.adapters.base.AdapterSet` that owns the parameters.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Adapter": "base",
    "AdapterSet": "base",
    "Method": "base",
    "attach": "base",
    "attached": "base",
    "load": "base",
    "read_header": "_header",
    "start": "base",
}


def __getattr__(name: str) -> Any:
    # Reading a file's header must not cost the import of torch.
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
