"""What other libraries say while they are imported, kept off the terminal; visiontune's own words are one line each."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def _show(message: Any, *_: Any, file: Any = None, **__: Any) -> None:
    print(f"visiontune: {' '.join(str(message).split())}", file=file or sys.stderr)
