"""Tensors on disk under a key that says all they depend on, so that nothing stale is ever read."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from visiontune.files import atomic_write

Tensors = dict[str, torch.Tensor]


def key(**parts: Any) -> str:
    """SHA-256 of named JSON values: any other value of any part is another key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Cache:
    """A folder of safetensors files named by their keys.

    Files appear whole or not at all. Each carries a checksum of its values; a damaged file counts as absent and is made
    again.

    Args:
        folder: where the files lie.
        memory: bytes of tensors that are kept in memory as well, those used last.
    """

    def __init__(self, folder: Path | str, memory: int = 0) -> None:
        self.folder, self.memory = Path(folder), memory
        self._kept: OrderedDict[str, Tensors] = OrderedDict()
        self._bytes = 0

    def path(self, key: str) -> Path:
        """Where a key's tensors lie."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        """The tensors of a key, from memory, read from disk, or else made and stored; not to be changed in place.

        Args:
            key: from :func:`key`.
            make: gives the tensors; called only when the disk has no sound copy.

        Raises:
            UserError: the folder cannot be written (disk full, no permission).
        """
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept
        stored = self._read(self.path(key))
        if stored is None:
            stored = self._write(self.path(key), make())
        self._keep(key, stored)
        return stored

    def _keep(self, key: str, tensors: Tensors) -> None:
        self._kept[key] = tensors
        self._bytes += _bytes(tensors)
        while self._bytes > self.memory:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _bytes(oldest)

    def _write(self, path: Path, made: Tensors) -> Tensors:
        tensors = {name: t.detach().cpu().contiguous() for name, t in made.items()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"checksum": _checksum(tensors)})
        return tensors

    def _read(self, path: Path) -> Tensors | None:
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
                checksum = (file.metadata() or {}).get("checksum")
        except (OSError, SafetensorError):
            return None
        return tensors if checksum == _checksum(tensors) else None


def _bytes(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _checksum(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
