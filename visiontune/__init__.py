"""visiontune: fine-tuning of diffusion models; any adapter, with any objective, on any model family."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from visiontune.errors import UserError

if TYPE_CHECKING:
    from visiontune.adapters.base import AdapterSet, attach
    from visiontune.models import load as load_model
    from visiontune.sampling.generate import generate
    from visiontune.training.loop import Trainer

__version__ = "0.2.0"
__all__ = ["AdapterSet", "Trainer", "UserError", "attach", "generate", "load_model"]

# Each of these modules imports torch, which costs seconds that a command line must not spend on --help.
_LAZY = {
    "AdapterSet": ("visiontune.adapters", "AdapterSet"),
    "attach": ("visiontune.adapters", "attach"),
    "load_model": ("visiontune.models", "load"),
    "generate": ("visiontune.sampling.generate", "generate"),
    "Trainer": ("visiontune.training.loop", "Trainer"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
