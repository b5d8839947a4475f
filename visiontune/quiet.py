"""How the command line starts: what other libraries say while they are imported stays off the terminal, and what is
imported for a rare case waits for it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# For samplers with beta sigmas, and for weights of few bits: a second of start-up each.
_RARE = ("scipy.stats", "bitsandbytes")
# Optional packages and old interfaces, reported to whoever imports diffusers: nothing that a user of it can mend.
_CHATTY = ("torch.utils._pytree", "bitsandbytes", "torchao")


@contextmanager
def hushed() -> Iterator[None]:
    """To be entered before anything heavy is imported. What the user's environment asks for is kept."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for kind in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", kind)
            warnings.showwarning = _show
        yield


def defer() -> None:
    """Have modules that libraries import for rare cases loaded when something in them is asked for."""
    for name in _RARE:
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if spec is not None:
            sys.modules[name] = _stand_in(name, spec)


def _stand_in(name: str, spec: ModuleSpec) -> ModuleType:
    """A module that becomes the one of its name when it is asked for what is in that.

    ``importlib.util.LazyLoader`` makes one that is loaded by the second module that imports it.
    """
    module = ModuleType(name)
    module.__spec__ = spec
    # `inspect` asks every module there is for it, on behalf of torch's operators.
    module.__file__ = spec.origin

    def load(attribute: str) -> Any:
        if sys.modules.get(name) is module:
            del sys.modules[name]
        real = importlib.import_module(name)
        vars(module).update(vars(real))
        return getattr(real, attribute)

    module.__getattr__ = load  # type: ignore[method-assign]
    return module


def _show(message: Any, *_: Any, file: Any = None, **__: Any) -> None:
    print(f"visiontune: {' '.join(str(message).split())}", file=file or sys.stderr)
