"""What tensors hold at the peak of some work, told by the life of every storage: nothing is asked of an allocator."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Lives(TorchDispatchMode):
    """Inside the block, the sum of all storages that are new or come in it, until each goes; `bytes` is its most."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.bytes, self._seen = 0, 0, set[int]()
        for tensor in alive():
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if not storage.data_ptr() or storage.data_ptr() in self._seen:
            return
        place, size = storage.data_ptr(), storage.nbytes()
        self._seen.add(place)
        self.now += size
        self.bytes = max(self.bytes, self.now)
        weakref.finalize(storage, self._remove, place, size)

    def _remove(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return out


@contextmanager
def fresh() -> Iterator[None]:
    """What there is before the block does not count as new in it."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def alive() -> list[torch.Tensor]:
    """Every new tensor that has values."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
