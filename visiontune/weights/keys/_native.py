"""Transformers whose own code has other layers than diffusers: of other names, joined, or with halves in another order.

Their own code is what ComfyUI and kohya's scripts run, and their files go by its names. A family says what its layers
are made of in tables: a name of its own code -> those of diffusers, apart by spaces, whose outputs it gives one after
the other.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

from torch import nn

from visiontune.errors import UserError
from visiontune.weights import keys
from visiontune.weights.keys import Native

_PART = "transformer"
# What files put before the layers of the transformer, dots apart; some nothing.
_READ = (
    "",
    "lora_unet_",
    "oft_unet_",
    "unet_",
    "transformer_",
    "lora_transformer_",
    "lycoris_",
    "diffusion_model_",
    "model_diffusion_model_",
)

# What sd-scripts looks into of CLIP and Gemma, and of T5.
CLIP = r"text_encoder(_\d)?\..*\.(self_attn|mlp)\."
T5 = r"text_encoder(_\d)?\..*\.(SelfAttention|DenseReluDense)\."
NOTHING = re.compile("(?!)")
# What leads to the layers of a language model here and in ComfyUI; longer ones first.
_LANGUAGE = {
    "model.language_model.": "model.",
    "model.": "model.",
    "language_model.": "model.",
    "layers.": "model.layers.",
    "embed_": "model.embed_",
}


class Keys(keys.Keys):
    """The names of a family's own code, where its tables have others than diffusers.

    Attributes:
        OUTSIDE: table of the layers that lie in no block.
        BLOCKS: name of a list of blocks -> that of diffusers, and the table of each block.
        SWAPPED: own names of layers whose two halves stand in the other order.
        ENCODERS: text encoder -> what kohya's files put before its layers; the first is written.
        COMFY: text encoder -> what ComfyUI calls it.
    """

    OUTSIDE: ClassVar[Mapping[str, str]] = {}
    BLOCKS: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {}
    SWAPPED: ClassVar[tuple[str, ...]] = ()
    ENCODERS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    COMFY: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def in_blocks(cls) -> tuple[str, ...]:
        return tuple(
            rf"{re.escape(block)}[._]\d+[._]{_either(layer)}(?:[._]|$)"
            for own, (theirs, table) in cls.BLOCKS.items()
            for block, layers in ((own, table), (theirs, " ".join(table.values()).split()))
            for layer in layers
        )

    @functools.cached_property
    def own(self) -> dict[str, Native]:
        """Every layer of the family's own code, dots apart: those of which the model has all parts."""
        tables = dict(self.OUTSIDE)
        for name, (theirs, table) in self.BLOCKS.items():
            for i in range(self.blocks(theirs)):
                tables |= {
                    f"{name}.{i}.{own}": " ".join(f"{theirs}.{i}.{layer}" for layer in layers.split())
                    for own, layers in table.items()
                }
        made = {own: tuple(f"{_PART}.{layer}" for layer in layers.split()) for own, layers in tables.items()}
        swapped = self.swapped()
        return {own: Native(layers, own in swapped) for own, layers in made.items() if self._plain.keys() >= {*layers}}

    @functools.cached_property
    def scripts(self) -> dict[str, Native]:
        """The same of the code that kohya's scripts run."""
        return self.own

    def swapped(self) -> tuple[str, ...]:
        """Own names of layers whose two halves stand in the other order."""
        return self.SWAPPED

    def blocks(self, name: str) -> int:
        """How many blocks a list of diffusers' transformer has."""
        start = f"{_PART}.{name}."
        return len({layer.removeprefix(start).partition(".")[0] for layer in self._plain if layer.startswith(start)})

    @functools.cached_property
    def _plain(self) -> dict[str, str]:
        """The transformer's layers -> their names without it."""
        part = self.modules.get(_PART)
        named = part.named_modules() if part is not None else ()
        return {f"{_PART}.{name}": name for name, layer in named if isinstance(layer, nn.Linear | nn.Conv2d)}

    def plain(self) -> dict[str, Native]:
        """What `own` would be if the family's own code were that of diffusers."""
        return {name: Native((layer,)) for layer, name in self._plain.items()}

    # -- what is written ------------------------------------------------------------------------------------------

    def kohya(self, layers: Iterable[str]) -> dict[str, Native]:
        return self._written(layers, self.scripts, self._kohyas_text, "kohya's scripts have")

    def comfy(self, layers: Iterable[str]) -> dict[str, Native]:
        return self._written(layers, self.own, self._comfys_text, "ComfyUI has")

    def _written(
        self,
        layers: Iterable[str],
        table: Mapping[str, Native],
        text: Callable[[str], str | None],
        reader: str,
    ) -> dict[str, Native]:
        places = {layer: name for name, native in table.items() for layer in native.layers}
        found = {}
        for layer in layers:
            if name := places.get(layer):
                found[f"lora_unet_{_flat(name)}"] = table[name]
            elif stem := text(layer):
                found[stem] = Native((layer,))
            else:
                raise UserError(f"{reader} no name for '{layer}' of the family '{self.family}'")
        return found

    def _kohyas_text(self, layer: str) -> str | None:
        component, _, rest = self.public(layer).partition(".")
        return f"{self.ENCODERS[component][0]}_{_flat(rest)}" if component in self.ENCODERS else None

    def _comfys_text(self, layer: str) -> str | None:
        """By keys of the state dict: of kohya's names ComfyUI has those of attention and MLP alone."""
        component, _, rest = self.public(layer).partition(".")
        name = self.comfys_encoders().get(component)
        if name is None:
            return None
        if not ("clip" in name or "t5" in name):
            start = next((start for start in _LANGUAGE if rest.startswith(start)), None)
            if start is None:
                return None
            rest = _LANGUAGE[start] + rest.removeprefix(start)
        return f"text_encoders.{name}.transformer.{rest}"

    def comfys_encoders(self) -> Mapping[str, str]:
        """Text encoder -> what ComfyUI calls it."""
        return self.COMFY

    # -- what is read ---------------------------------------------------------------------------------------------

    def natives(self, layers: Iterable[str]) -> dict[str, Native]:
        layers = list(layers)
        there, found = {*layers}, dict[str, Native]()
        for table in (self.plain(), self.scripts, self.own):
            for name, native in table.items():
                if there >= {*native.layers}:
                    found |= {f"{prefix}{_flat(name)}": native for prefix in _READ}
        for layer in layers:
            component, _, rest = self.public(layer).partition(".")
            stems = [f"{prefix}_{_flat(rest)}" for prefix in self.ENCODERS.get(component, ())]
            found |= dict.fromkeys([*stems, *filter(None, [self._comfys_text(layer)])], Native((layer,)))
        return super().natives(layers) | found


def _either(name: str) -> str:
    """A pattern of a name with dots or with underscores in their place."""
    return "[._]".join(map(re.escape, name.split(".")))


def _flat(name: str) -> str:
    return name.replace(".", "_")
