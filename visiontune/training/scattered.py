"""The part of a checkpoint that lies in parts on several processes: torch's distributed checkpoints, in safetensors.

Each process writes the parts that it has, and reads those that it is to have, on however many processes. In the rest of
the checkpoint a tensor without values, on the device ``meta``, keeps the place of each.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, zeros

from visiontune.ops.shards import is_sharded

FOLDER = "shards"


def has_parts(tree: Any) -> bool:
    """Whether there is a sharded tensor in nested dicts and lists."""
    return any(is_sharded(tensor) for _, tensor in _tensors(tree))


def write(folder: Path, tree: Any) -> Any:
    """Write the sharded tensors of nested dicts and lists into a new folder; every process takes part.

    Returns:
        The same with their places kept.
    """
    parts = {path: tensor.detach() for path, tensor in _tensors(tree) if is_sharded(tensor)}
    dcp.save(parts, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    return _put(tree, _places(parts))


def read(folder: Path, tree: Any, mesh: DeviceMesh | None) -> Any:
    """What :func:`write` was given, sharded among the processes of ``mesh``, or whole without one.

    Raises:
        ValueError: a part is missing.
    """
    wanted = {path: tensor for path, tensor in _tensors(tree) if tensor.is_meta}
    made = {path: _made(tensor, mesh) for path, tensor in wanted.items()}
    reader = HuggingFaceStorageReader(str(folder))
    known: Any = reader.read_metadata().state_dict_metadata
    for path, tensor in wanted.items():
        # Torch leaves holes as they are.
        chunks = known[path].chunks if path in known else ()
        if sum(math.prod(chunk.sizes) for chunk in chunks) != tensor.numel():
            raise ValueError(f"{folder} has not all of {path}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(made, storage_reader=reader, no_dist=mesh is None)
    return _put(tree, made)


def _made(like: Tensor, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return torch.zeros(like.shape, dtype=like.dtype)
    return zeros(*like.shape, dtype=like.dtype, device_mesh=mesh, placements=[Shard(0)])


def _places(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {path: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for path, tensor in parts.items()}


def _tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts and lists, with the keys that lead to them."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict | list | tuple):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(part, f"{path}/{key}" if path else str(key))


def _put(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The same with some tensors in the place of those at their paths."""
    if path in tensors:
        return tensors[path]
    if isinstance(tree, dict):
        return {key: _put(part, tensors, f"{path}/{key}" if path else str(key)) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        return [_put(part, tensors, f"{path}/{i}" if path else str(i)) for i, part in enumerate(tree)]
    return tree
