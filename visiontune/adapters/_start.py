"""Starting the training of a set from a trained file."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from visiontune import schema
from visiontune.adapters import _storage
from visiontune.adapters._set import AdapterSet
from visiontune.errors import UserError


def start(adapters: AdapterSet, path: str | Path) -> None:
    """Give an attached set the function of a file, as the start of its training.

    A method's module may define ``refit(adapter, tensors, was)``, which makes the tensors that a file of options
    ``was`` holds for a layer into those of ``adapter``; without it all options must be those of the file.

    Raises:
        UserError: no such file, another method, other layers, another base, or options that do not fit.
    """
    path = Path(path).expanduser()
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
    _storage.check_base(path, header, adapters.base_layers(), "start from an adapter of this base")
    module = sys.modules[type(adapters.config).__module__]
    if hasattr(module, "refit"):
        was = schema.from_mapping(module.Config, header["config"], str(path))
        grouped = _storage.by_layer(saved)
        made = {layer: module.refit(adapter, grouped[layer], was) for layer, adapter in adapters.adapters().items()}
        saved = {f"{layer}.{name}": value for layer, values in made.items() for name, value in values.items()}
    else:
        now = asdict(adapters.config)
        for option, value in header["config"].items():
            if now.get(option) != value:
                raise UserError(f"start: {path} has {option}={value}, not {now.get(option)}: set {option} to it")
    adapters.fill(path, saved)
