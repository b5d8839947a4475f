"""`Model`: a set of named networks. Trainers, optimisers, checkpoints, results and exports see no more than this."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from visiontune.errors import UserError
from visiontune.models._quantise import plain
from visiontune.schema import nearest

if TYPE_CHECKING:
    from visiontune.models._attention import Choice
    from visiontune.models._offload import Offloaded

Presets = Mapping[str, tuple[str, ...]]


class Model(ABC):
    """Networks under the names that prefix their saved keys, frozen and in evaluation mode.

    Networks that do one job have a role in common: the text encoders of a pipeline are `text`, whatever their number.
    Wherever parts of a model are named (`train.parts`, `fingerprint`, `presets`), a role stands for its networks.

    Attributes:
        family: the family's key, which is its file name; classes without one are no families.
        task: what the Hub calls what the model does.
        TARGETS: role -> preset name -> layers, in the terms of `visiontune.adapters.attach`: a dotted end of a layer's
            name, a layer class, or a regular expression. Its first role is what is trained when nothing is said.
        source: what the user named: a pocket name, a folder or a Hub id.
        precision: the type that the networks compute in under `autocast`, whatever their weights are; None for theirs.
        distilled: why the model counts as distilled to few steps, which a plain denoising loss undoes; None for others.
        attention: what chooses how attention is computed; None for whatever the libraries take.
        offloaded: the networks whose blocks rest in the main memory, by name.
        root: the module whose children the networks are, where other tools open it as one; adapters of several networks
            are one adapter to them then.
    """

    family: ClassVar[str]
    task: str
    TARGETS: ClassVar[Mapping[str, Presets]]

    source: str
    precision: torch.dtype | None = None
    distilled: str | None = None
    attention: Choice | None = None
    offloaded: Mapping[str, Offloaded] = MappingProxyType({})
    root: nn.Module | None = None

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Every network by its name."""

    @abstractmethod
    def roles(self) -> dict[str, tuple[str, ...]]:
        """The names of the networks of each role."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the whole model into a new folder, in the layout that it was opened from."""

    # -- parts --------------------------------------------------------------------------------------------------

    def names(self, parts: Iterable[str] | None = None) -> tuple[str, ...]:
        """The networks that names and roles stand for, each once; without any, those of the first role.

        Raises:
            UserError: a word that is neither; it lists those that are.
        """
        roles, networks = self.roles(), self.networks()
        found: dict[str, None] = {}
        for part in parts if parts is not None else [next(iter(self.TARGETS))]:
            if part not in roles and part not in networks:
                known = {*(role for role, names in roles.items() if names), *networks}
                raise UserError(f"model '{self.source}' ({self.family}) has no part '{part}'{nearest(part, known)}")
            found |= dict.fromkeys([part] if part in networks else roles[part])
        return tuple(found)

    def of(self, *parts: str) -> dict[str, nn.Module]:
        """The networks of some names or roles."""
        networks = self.networks()
        return {name: networks[name] for name in self.names(parts)}

    def idle(self) -> tuple[str, ...]:
        """Layers that compute what nothing reads, with their network in front: presets leave them out."""
        return ()

    def presets(self, parts: Iterable[str] | None = None) -> dict[str, tuple[str, ...]]:
        """Target presets for some networks: to each the patterns of its role, as `network:pattern`."""
        names = self.names(parts)
        concerned = {
            name: self.TARGETS[role]
            for role, own in self.roles().items()
            for name in own
            if role in self.TARGETS and name in names
        }
        presets = {preset: list[str]() for targets in concerned.values() for preset in targets}
        for preset, patterns in presets.items():
            for name, targets in concerned.items():
                patterns += [f"{name}:{pattern}" for pattern in targets.get(preset, ())]
            idle = [layer.partition(".") for layer in self.idle() if patterns]
            patterns += [f"-{name}:{layer}" for name, _, layer in idle if name in names]
        return {preset: tuple(patterns) for preset, patterns in presets.items()}

    # -- where and how it computes ------------------------------------------------------------------------------

    @property
    def main(self) -> nn.Module:
        """The first network of the first role."""
        return self.networks()[self.names()[0]]

    @property
    def device(self) -> torch.device:
        """Where the main network lies."""
        return next(self.main.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the main network's first weight that has one."""
        return dtype_of(self.main)

    def to(self, device: torch.device | str, *parts: str) -> Self:
        """Move some networks, or all, but for blocks that rest; returns self."""
        for name, network in self.of(*(parts or self.networks())).items():
            self.offloaded.get(name, network).to(device)
        return self

    def release(self, *parts: str) -> Self:
        """Move networks that are not needed for a while to the CPU, and give their memory back to the device."""
        if parts and self.device.type != "cpu":
            self.to("cpu", *parts)
            torch.accelerator.empty_cache()
        return self

    def at(self, precision: torch.dtype | None) -> Self:
        """The same networks, computing in another precision; what encodes data for caches stays as it was."""
        other = copy.copy(self)
        other.precision = precision
        return other

    def autocast(self) -> AbstractContextManager[Any]:
        """In the block, networks compute in `precision`; what lies between calls of them stays outside of it."""
        return nullcontext() if self.precision is None else torch.autocast(self.device.type, self.precision)

    def training(self) -> AbstractContextManager[Any]:
        """Around the steps of a run: a family may choose what computes fastest with gradients."""
        return nullcontext()

    def accept(self, header: Mapping[str, Any]) -> None:
        """Make room for the layers of an adapter file that the base does not have.

        Args:
            header: as `visiontune.adapters.read_header` gives it.

        Raises:
            UserError: the model has no place for them.
        """
        if header["whole"]:
            raise UserError(f"model '{self.source}' ({self.family}) has no place for '{header['whole'][0]}'")

    # -- identity -----------------------------------------------------------------------------------------------

    def fingerprint(self, *parts: str) -> str:
        """A short hash of the weights of some networks, cheap and equal on every device.

        Up to 64 values of each tensor are read, rounded to bfloat16: the hash of a main network then does not depend on
        whether the model was loaded in float32 or bfloat16. Those of others name their type, since caches hold what
        they give.
        """
        digest, main = hashlib.sha256(), self.names()
        for name, network in self.of(*parts).items():
            digest.update(_hash_weights(network, name).encode())
            if name not in main:
                digest.update(str(dtype_of(network)).encode())
        self._identify(parts, digest)
        return digest.hexdigest()[:16]

    def _identify(self, parts: Sequence[str], digest: Any) -> None:
        """Put into the hash of some parts what else decides what they give; a vocabulary, for instance."""
        return


def freeze(networks: Iterable[nn.Module]) -> None:
    """Networks as a model holds them: without gradients, in evaluation mode."""
    for network in networks:
        network.requires_grad_(False).eval()


class Bare(nn.Module):
    """A parameter that belongs to no network but the whole model, as a network."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.value = parameter


def split(*modules: nn.Module) -> dict[str, nn.Module]:
    """The networks that one module of many is made of: its children, and every parameter that is in none of them.

    Args:
        modules: the module; before it those within it that are to be split too. Of parameters that are tied the first
            network to have them keeps them.
    """
    found: dict[str, nn.Module] = {}
    held: set[nn.Parameter] = set()
    for module in modules:
        children: dict[str, nn.Module] = {n: child for n, child in module.named_children() if child not in modules}
        bare = {name: Bare(parameter) for name, parameter in module.named_parameters(recurse=False)}
        for name, network in (children | bare).items():
            own = {*network.parameters()} - held
            if own:
                found[name] = network
                held |= own
    return found


def dtype_of(module: nn.Module) -> torch.dtype:
    """The floating-point type of a module's first weight that has one."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def _hash_weights(module: nn.Module, name: str, samples: int = 64) -> str:
    """Hash of a module's name and weights."""
    digest = hashlib.sha256(name.encode())
    values: list[Tensor] = []
    for key, tensor in sorted(module.state_dict().items()):
        if tensor.is_floating_point():
            digest.update(f"{key}{tuple(tensor.shape)}".encode())
            stride = max(1, tensor.numel() // samples)
            values.append(plain(tensor.detach()).reshape(-1)[::stride].to("cpu", torch.bfloat16))
    digest.update(torch.cat(values).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def require(condition: bool, source: str, why: str) -> None:
    """Refuse a pipeline that has the right class but is not of the family: UserError naming `source`."""
    if not condition:
        raise UserError(f"model '{source}' is not supported: {why}")


def require_text_to_image(plain: bool, source: str, channels: int) -> None:
    """Refuse a transformer that takes more than noisy latents, or gives more than a prediction: UserError."""
    require(plain, source, f"its transformer takes {channels} channels; give a text-to-image one")
