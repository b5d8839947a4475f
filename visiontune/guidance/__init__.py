"""Guidance that composes: terms, one a file, that a `GuidanceStack` puts together.

`GuidanceStack` is a `visiontune.diffusion.guidance.Guidance`, and guides rollouts, replays, reward gradients and stock
pipelines.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {"GuidanceStack": "stack", "Plan": "stack"}


def __getattr__(name: str) -> Any:
    # Listing the terms must not cost the import of torch.
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
