"""Adapters of any origin: visiontune's own files, those of other tools, and folders of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from visiontune import adapters
from visiontune.adapters import AdapterSet
from visiontune.adapters._header import is_own
from visiontune.errors import UserError
from visiontune.weights.keys import keys_of
from visiontune.weights.lora_files import read_lora
from visiontune.weights.peft_folders import of_root, read_peft


def read(
    source: Path, networks: Mapping[str, nn.Module], family: str, component: str, name: str = "default"
) -> AdapterSet:
    """Attach the adapter of a file or folder, in evaluation mode.

    Args:
        source: a ``.safetensors`` file, or a folder that PEFT saved.
        networks: all of the model's, by name. family: the model's.
        component: the network that a folder belongs to.
        name: see :func:`visiontune.adapters.attach`.

    Raises:
        UserError: see :func:`visiontune.adapters.load` for visiontune's own files, and :func:`read_foreign`.
    """
    if source.is_file() and is_own(source):
        return adapters.load(networks, source, name=name)
    return read_foreign(source, networks, family, component, name)


def read_foreign(
    source: Path, networks: Mapping[str, nn.Module], family: str, component: str, name: str = "default"
) -> AdapterSet:
    """The same of other tools' adapters alone.

    Raises:
        UserError: the model has no such component; or see :func:`read_lora` and :func:`read_peft`.
    """
    if not source.is_dir():
        return read_lora(source, networks, keys_of(family, networks), name)
    if of_root(source, networks):
        return read_peft(source, networks, name)
    if component not in networks:
        raise UserError(f"the model has no component '{component}'; it has {', '.join(networks)}")
    return read_peft(source, {component: networks[component]}, name)
