"""Tensors that lie in parts on several processes (torch's ``DTensor``), beside ordinary ones.

They are told by what they can do, so that adapters and objectives know nothing of ``torch.distributed``.
"""

from __future__ import annotations

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process has but its part of the tensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part that this process has, which shares memory with the tensor; an ordinary tensor itself."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of it, which every process has to ask for; an ordinary tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
