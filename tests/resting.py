"""Tells copies of weights that rest in the main memory from what rests, which on a CPU would pass for each other."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visiontune.models._offload import Offloaded
from visiontune.ops.memory import held, stored


class Watched(TorchDispatchMode):
    """Inside the block, follows what is done with the weights that rest.

    Attributes:
        read: the operations, but for copying, that were given what rests.
        now, most: bytes of copies that there are, and the most that there were.
    """

    def __init__(self, offloaded: Offloaded) -> None:
        super().__init__()
        self._home = {_place(part) for t in offloaded.tensors() for part in stored(t)}
        self.read, self.now, self.most = set[str](), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(_place(part) in self._home for t in tensors for part in stored(t)):
            if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
                for part in stored(out):
                    self._count(part.untyped_storage())
            elif func is not torch.ops.aten.detach.default:
                self.read.add(str(func))
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size


def _place(tensor: torch.Tensor) -> int | None:
    """Where a tensor's values begin; sparse ones have no one place."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else None


def rest(model: Any, device: str = "cpu") -> Offloaded:
    """Let the blocks of a model's denoiser rest, and the remainder lie on a device."""
    name = model.names()[0]
    model.offloaded = {name: Offloaded(model.networks()[name], name, model.source)}
    model.to(device, name)
    return model.offloaded[name]


def largest(offloaded: Offloaded) -> int:
    """Bytes of the largest block."""
    return max(held([*block.parameters(), *block.buffers()]) for block in offloaded.blocks)
