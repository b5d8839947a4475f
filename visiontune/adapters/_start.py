"""Starting the training of a set from a trained file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from visiontune import schema
from visiontune.adapters import _bounded, _storage
from visiontune.adapters._set import AdapterSet
from visiontune.errors import UserError


def start(adapters: AdapterSet, path: str | Path) -> None:
    """Give an attached set the function of a file, as the start of its training.

    A method's module may define ``refit(adapter, tensors, was)``, which makes the tensors that a file of options
    ``was`` holds for a layer into those of ``adapter``; without it all options must be those of the file.

    Raises:
        UserError: no such file, another method, other layers, another base, or options or tensors that do not fit.
    """
    header, saved = _storage.read(path)
    if header["method"] != adapters.method:
        raise UserError(
            f"start: {path} holds the adapter '{header['method']}', not '{adapters.method}': set name to it"
        )
    other = sorted(set(header["layers"]) ^ set(adapters.layers))
    if other:
        raise UserError(
            f"start: '{other[0]}' and {len(other) - 1} more layers are adapted either in {path} or here: "
            f"set targets to {header['targets']}, and train.parts as it was"
        )
    if words := sorted(set(header["words"]) ^ set(adapters.embeddings())):
        raise UserError(
            f"start: words of '{words[0]}' are trained either in {path} or here: put trigger into train.parts, or "
            "leave it out"
        )
    if whole := sorted(set(header["whole"]) ^ set(adapters.wholes())):
        raise UserError(
            f"start: '{whole[0]}' is trained as a whole either in {path} or here: set objective.w as it was, which "
            "says whether a student is told its guidance"
        )
    _storage.check_base(path, header, adapters.base_layers(), "start from an adapter of this base")
    module = sys.modules[type(adapters.config).__module__]
    if hasattr(module, "refit"):
        saved = _refitted(adapters, path, module, header["config"], saved)
    else:
        now = asdict(adapters.config)
        for option, value in header["config"].items():
            if now.get(option) != value:
                raise UserError(f"start: {path} has {option}={value}, not {now.get(option)}: set {option} to it")
    adapters.fill(path, saved)


def _refitted(
    adapters: AdapterSet, path: str | Path, module: Any, options: Mapping[str, Any], saved: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a file in the shapes of the set."""
    was, grouped = schema.from_mapping(module.Config, options, str(path)), _storage.by_layer(saved)
    made: dict[str, Tensor] = {}
    with _bounded.building(path, saved, list(adapters.base_layers().values())):
        for layer, adapter in adapters.adapters().items():
            if layer in adapters.embeddings() or layer in adapters.wholes():
                continue
            own, now = grouped.pop(layer, {}), adapter.tensors()
            for name in own.keys() & now.keys():
                _storage.check_kind(path, f"{layer}.{name}", now[name], own[name])
            made |= {f"{layer}.{name}": value for name, value in module.refit(adapter, own, was).items()}
    # What is of no layer here is refused with what does not fit.
    return made | {f"{layer}.{name}": value for layer, own in grouped.items() for name, value in own.items()}
