"""Adapter files: writing, reading, and knowing the base they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visiontune import files, outside
from visiontune.adapters import _header
from visiontune.adapters._quantised import error_of, weight_of
from visiontune.errors import UserError

_HASHED, _SAMPLED = 256, 8


@dataclass(frozen=True)
class Base:
    """What is remembered of the base weights under a set.

    Attributes:
        digest: hash of the adapted layers' names, shapes and a strided sample of their weights.
        sample: layer name -> a few of its weights, which survive a change of precision and the hash does not.
        error: layer name -> how far a quantised layer's sample may be from the weight before; others have no entry.
    """

    digest: str
    sample: dict[str, list[float]]
    error: dict[str, float]


def fingerprint(layers: Mapping[str, nn.Module]) -> Base:
    """Identify the weights of the adapted layers; reads a strided sample of at most 256 values a layer."""
    digest, sample, errors = hashlib.sha256(), {}, {}
    for name, layer in layers.items():
        weight = weight_of(layer)
        values = _strided(weight, _HASHED)
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        if error := error_of(layer, weight):
            errors[name] = float(f"{error:.5g}")
        digest.update(values.numpy().tobytes())
        sample[name] = [float(f"{value:.5g}") for value in _strided(values, _SAMPLED)]
    return Base(digest.hexdigest(), sample, errors)


def _strided(values: Any, count: int) -> Tensor:
    flat = values.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // count)][:count].float().cpu()


def check_base(
    path: str | Path,
    header: Mapping[str, Any],
    layers: Mapping[str, nn.Module],
    mend: str = "load that base, or pass allow_other_base=True",
) -> None:
    """Compare the weights of ``layers`` with those that the file was trained on.

    Raises:
        UserError: they are others. Rounding to half precision is let pass, and so is quantisation, then or now.
    """
    present = fingerprint(layers)
    if present.digest == header["base_hash"]:
        return
    for name, values in present.sample.items():
        here, there = torch.tensor(values), torch.tensor(header["base_sample"][name])
        error = present.error.get(name, 0.0) + header["base_error"].get(name, 0.0)
        if here.shape != there.shape or not torch.allclose(here, there, rtol=2**-7, atol=1e-6 + error):
            raise UserError(f"{path}: trained on other base weights (layer '{name}' differs): {mend}")


def digest(told: str, tensors: Mapping[str, Tensor]) -> str:
    """A short hash of a text and of tensors with their names, types and shapes, equal on every device."""
    found = hashlib.sha256(told.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def write(
    path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], metadata: Mapping[str, str]
) -> Path:
    """Write an adapter file atomically."""
    clash = sorted(set(header) & set(metadata))
    if clash:
        raise UserError(f"metadata '{clash[0]}' is a name that visiontune writes itself: choose another")
    copies = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    with files.atomic_write(path) as temporary:
        save_file(copies, temporary, {**header, **{key: str(value) for key, value in metadata.items()}})
        _header.sort_header(temporary)
    return Path(path)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an adapter file.

    Raises:
        UserError: see :func:`visiontune.adapters.read_header`; or the tensors are damaged, or not all finite.
    """
    header = _header.read_header(path)
    try:
        tensors = load_file(Path(path).expanduser())
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is damaged ({error}): copy or train it again") from error
    for name, tensor in tensors.items():
        # Not every kind of eight bits can be asked.
        if not torch.isfinite(tensor.float() if tensor.is_floating_point() else tensor).all():
            raise UserError(f"'{path}' holds numbers that are not finite ('{outside.shown(name)}'): train it again")
    return header, tensors


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer -> name -> tensor, for the keys ``<layer>.<name>`` of a file."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, _, name = key.rpartition(".")
        grouped.setdefault(layer, {})[name] = value
    return grouped


@torch.no_grad()
def fill(path: str | Path, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into those of a set.

    Raises:
        UserError: a key on one side only, another shape, or another kind of number.
    """
    for key in sorted(own.keys() ^ saved.keys()):
        where = "has no tensor" if key in own else "has a tensor without an adapter,"
        raise UserError(
            f"{path} {where} '{outside.shown(key)}': it does not fit its own header; copy or train it again"
        )
    for key, value in saved.items():
        check_kind(path, key, own[key], value)
        if own[key].shape != value.shape:
            shapes = f"{tuple(value.shape)}, the model needs {tuple(own[key].shape)}"
            raise UserError(f"{path}: '{key}' has shape {shapes}: load it into the model it was trained on")
        own[key].copy_(value)


def check_kind(path: str | Path, key: str, own: Tensor, saved: Tensor) -> None:
    """Refuse a saved tensor of another kind of number than that of a set, which a copy would cut short."""
    if _kind(own) != _kind(saved):
        raise UserError(f"{path}: '{key}' is {saved.dtype}, not {own.dtype}: copy or train it again")


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """What copying must not change: whether there are fractions, and whether there are imaginary parts."""
    return tensor.is_floating_point(), tensor.is_complex()
