"""Building what a file's header asks for, within the size that the file and its layers can account for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from visiontune.errors import UserError

# How many times over a method makes what is in the file and the layers: starts, masks, places of entries.
_TIMES, _SLACK = 8, 1 << 20
# Each tensor costs time, however small it is.
_LEAST = 64
_COUNTED = ("arange", "eye", "randperm")
_TROUBLE = (
    ArithmeticError,
    AssertionError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _TooLarge(Exception):
    """More is asked for than there is room for."""


class _Room(TorchDispatchMode):
    """Counts what is made of a size that is given by numbers, before it is made."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.left = values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (size := _size(func.__name__.partition(".")[0], args)) is not None:
            self.left -= max(_LEAST, size)
            if self.left < 0:
                raise _TooLarge
        return func(*args, **(kwargs or {}))


def _size(name: str, args: tuple[Any, ...]) -> int | None:
    """How many values an operation makes where numbers say so, None where its inputs do."""
    if name in _COUNTED:
        return math.prod(max(1, int(value)) for value in args if isinstance(value, (int, float)))
    like = args[:1] if args and isinstance(args[0], Tensor) else ()
    if like and not name.startswith("new_") and name != "repeat":
        return None
    sizes = next((value for value in args if isinstance(value, (list, tuple))), None)
    if sizes is None or not all(isinstance(size, int) for size in sizes):
        return None
    return math.prod(sizes) * (like[0].numel() if name == "repeat" else 1)


@contextmanager
def building(path: str | Path, tensors: Mapping[str, Tensor], layers: Sequence[Any]) -> Iterator[None]:
    """In the block a method is built from the header of ``path``.

    Args:
        path: the file, for messages.
        tensors: what it holds. layers: what it adapts.

    Raises:
        UserError: its options ask for more than its tensors and layers can account for, or nothing can be built.
    """
    values = sum(tensor.numel() for tensor in tensors.values())
    values += sum(layer.weight.numel() for layer in layers)
    try:
        with _Room(_TIMES * values + _SLACK):
            yield
    except _TooLarge as error:
        raise UserError(
            f"{path}: the options of its header ask for far more than it holds: copy or train it again"
        ) from error
    except _TROUBLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: nothing can be built by the options of its header ({reason}): train it again"
        ) from error
