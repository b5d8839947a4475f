"""What other tools call the layers of a model: one file a family, which is called as the family.

A file ``<family>.py`` defines a class ``Keys``, made of the model's modules, that builds on the one here or on another
family's. A family without a file has the names of diffusers and PEFT.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from visiontune.errors import UserError

if TYPE_CHECKING:
    from torch import nn


# What CLIP's text encoders begin with below the level that files have and transformers 5 has dropped; T5's do not.
_CLIP = ("embeddings.", "encoder.layers.", "final_layer_norm")


class Keys:
    """The names of diffusers and PEFT, which are the model's own but for a level of CLIP's text encoders.

    Args:
        family: of the model, for messages.
        modules: component name (``unet``, ``text_encoder``, ...) -> module, all of the model's.

    Layers are named with their component in front: ``unet.conv_in``.
    """

    def __init__(self, family: str = "unknown", modules: Mapping[str, nn.Module] | None = None) -> None:
        self.family, self.modules = family, dict(modules or {})

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

    def kohya(self, layers: Iterable[str]) -> dict[str, str]:
        """What kohya's scripts themselves would call each of the layers.

        Raises:
            UserError: they have no names for the family, or for the component of a layer.
        """
        raise UserError(f"kohya's scripts have no names for the layers of the family '{self.family}'")

    def comfy(self, layers: Iterable[str]) -> dict[str, str]:
        """What ComfyUI calls each of the layers, norms and embeddings too: kohya's names where a family says no other.

        Raises:
            UserError: it has no names for the family, or for the component of a layer.
        """
        return self.kohya(layers)

    def names(self, layers: Iterable[str]) -> dict[str, str]:
        """Every name that a file may use for one of the layers -> the layer.

        CLIP's text encoders have the level ``text_model`` under one version of transformers and not under another.
        """
        layers = list(layers)
        short = {layer.replace(".text_model.", ".", 1): layer for layer in layers if layer.startswith("text_encoder")}
        return short | {self.public(layer): layer for layer in layers} | {layer: layer for layer in layers}


def keys_of(family: str, modules: Mapping[str, nn.Module]) -> Keys:
    """The names of a model's layers: those of its family's file, otherwise the plain ones."""
    if family in {module.name for module in pkgutil.iter_modules(__path__)}:
        return importlib.import_module(f"{__name__}.{family}").Keys(family, modules)
    return Keys(family, modules)
