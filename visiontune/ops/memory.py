"""What the allocator of a device holds: of tensors, for a backward pass, and at the peak of some work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


def stored(tensor: Any) -> list[Tensor]:
    """The tensors that hold the values of one: of a quantised weight the codes and the scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in stored(getattr(tensor, name))]


def held(tensors: Iterable[Tensor], device: torch.device | None = None) -> int:
    """Bytes of the values of some tensors, each tensor once; with ``device`` those that lie on one of its kind."""
    parts = [part for t in {id(t): t for t in tensors}.values() for part in stored(t)]
    return sum(p.numel() * p.element_size() for p in parts if device is None or p.device.type == device.type)


class Kept(saved_tensors_hooks):
    """Inside the block, counts the bytes that autograd keeps for the backward pass, each storage once.

    Args:
        known: tensors that are there anyway (weights), which are not counted.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        self._known = {part.untyped_storage().data_ptr() for t in known for part in stored(t)}
        self._storages: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        for storage in (part.untyped_storage() for part in stored(tensor)):
            if storage.data_ptr() not in self._known:
                self._storages[storage.data_ptr()] = storage.nbytes()
        # A result that is kept as it is would hold the node that keeps it, and neither would ever go.
        return tensor.detach()

    @property
    def bytes(self) -> int:
        """The total."""
        return sum(self._storages.values())


class Peak:
    """Follows the allocator of the CPU inside the block, as torch's profiler reports every block that it hands out."""

    def __enter__(self) -> Peak:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        results: Any = self._profile.profiler
        left, blocks = list(results.kineto_results.experimental_event_tree()), []
        while left:
            event = left.pop()
            left += event.children
            if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
                blocks.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        self._blocks = [(place, size) for _, place, size in sorted(blocks)]
        del self._profile

    def beside(self, resident: Iterable[Tensor]) -> int:
        """The most bytes that it held of what was asked for inside the block, but for the values of some tensors."""
        apart = {part.untyped_storage().data_ptr() for t in resident for part in stored(t)}
        now = most = 0
        for place, size in self._blocks:
            now += 0 if place in apart else size
            most = max(most, now)
        return most
