"""What other tools call the layers of a model: one file a family, which is called as the family.

A file ``<family>.py`` defines a class ``Keys``, made of the model's modules, that builds on the one here, on the one of
``_native.py`` or on another family's. A family without a file has the names of diffusers and PEFT.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from visiontune.errors import UserError

if TYPE_CHECKING:
    from torch import nn


# What CLIP's text encoders begin with below the level that files have and transformers 5 has dropped; T5's do not.
_CLIP = ("embeddings.", "encoder.layers.", "final_layer_norm")


class Native(NamedTuple):
    """What a layer of another tool's code is to the model.

    Attributes:
        layers: the model's whose outputs it gives, one after the other.
        swapped: whether the halves of these outputs stand in the other order, as scale and shift of some modulations.
    """

    layers: tuple[str, ...]
    swapped: bool = False


class Reader(NamedTuple):
    """A reader of kohya's files that has no place for some layers.

    Attributes:
        places: what it reads, by the model's names of layers. mend: what is to be done about the others.
    """

    places: re.Pattern[str]
    mend: str


class Keys:
    """The names of diffusers and PEFT, which are the model's own but for a level of CLIP's text encoders.

    Args:
        family: of the model, for messages.
        modules: component name (``unet``, ``text_encoder``, ...) -> module, all of the model's.

    Layers are named with their component in front: ``unet.conv_in``.

    Attributes:
        ALPHA: what kohya's files say of every layer; none for its rank, so that the factors alone are the change.
        NETWORK: the module of kohya's scripts that such a file is of.
        READERS: those that leave something out of kohya's files, by their names.
    """

    ALPHA: ClassVar[float | None] = None
    NETWORK: ClassVar[str] = "networks.lora"
    READERS: ClassVar[Mapping[str, Reader]] = {}

    def __init__(self, family: str = "unknown", modules: Mapping[str, nn.Module] | None = None) -> None:
        self.family, self.modules = family, dict(modules or {})

    def module(self, layer: str) -> Any:
        """The layer itself."""
        component, _, rest = layer.partition(".")
        return self.modules[component].get_submodule(rest)

    @classmethod
    def in_blocks(cls) -> tuple[str, ...]:
        """Patterns of the layers in the family's blocks, by which a file of it is recognised."""
        return ()

    def described(self, prediction: str | None) -> tuple[str, str]:
        """The architecture as ModelSpec calls it, and the base's version as kohya's scripts do: the family's own name.

        Args:
            prediction: what the model's network predicts, such as ``v``.
        """
        return self.family, self.family

    def public(self, layer: str) -> str:
        """The layer's name in published files, in which text encoders keep a level that transformers 5 has dropped."""
        component, _, rest = layer.partition(".")
        if component.startswith("text_encoder") and rest.startswith(_CLIP):
            rest = f"text_model.{rest}"
        return f"{component}.{rest}"

    def kohya(self, layers: Iterable[str]) -> dict[str, Native]:
        """What kohya's scripts themselves call the layers that these are or belong to.

        Raises:
            UserError: they have no names for the family, or for a layer.
        """
        raise UserError(f"kohya's scripts have no names for the layers of the family '{self.family}'")

    def comfy(self, layers: Iterable[str]) -> dict[str, Native]:
        """What ComfyUI calls them, norms and embeddings too: kohya's names where a family says no other.

        Raises:
            UserError: it has no names for the family, or for a layer.
        """
        return self.kohya(layers)

    def names(self, layers: Iterable[str]) -> dict[str, str]:
        """Every name that a file may use for one of the layers -> the layer.

        CLIP's text encoders have the level ``text_model`` under one version of transformers and not under another.
        """
        layers = list(layers)
        short = {layer.replace(".text_model.", ".", 1): layer for layer in layers if layer.startswith("text_encoder")}
        return short | {self.public(layer): layer for layer in layers} | {layer: layer for layer in layers}

    def natives(self, layers: Iterable[str]) -> dict[str, Native]:
        """Every name that a file may use for a layer of any tool -> what it is to the model's layers."""
        return {name: Native((layer,)) for name, layer in self.names(layers).items()}


def keys_of(family: str, modules: Mapping[str, nn.Module]) -> Keys:
    """The names of a model's layers: those of its family's file, otherwise the plain ones."""
    if family in {module.name for module in pkgutil.iter_modules(__path__)}:
        return importlib.import_module(f"{__name__}.{family}").Keys(family, modules)
    return Keys(family, modules)
