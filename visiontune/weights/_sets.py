"""What adapter sets that are stacked on one model change in it, taken together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visiontune.adapters import AdapterSet
from visiontune.adapters._layers import Entry, change, entries_of
from visiontune.adapters.lora import DoRA


class Changes:
    """The sets as one: what they make of the base's weights, each on top of those beneath it.

    Args:
        sets: attached to one model, and active, at their present strengths. Others on the model count for nothing.
    """

    def __init__(self, sets: Sequence[AdapterSet]) -> None:
        self.sets = list(sets)
        layers = {name: layer for found in self.sets for name, layer in found.base_layers().items()}
        embeddings = {name for found in self.sets for name in found.embeddings()}
        self._layers = {name: layer for name, layer in layers.items() if name not in embeddings}

    def only(self, component: str) -> Changes:
        """The same of one component's layers alone; not to be merged."""
        part = Changes(self.sets)
        part._layers = {name: layer for name, layer in self._layers.items() if name.partition(".")[0] == component}
        return part

    @property
    def layers(self) -> list[str]:
        """Names of all adapted layers, with the component's prefix."""
        return list(self._layers)

    def layer(self, name: str) -> Any:
        """The adapted layer itself; its ``weight`` and ``bias`` are the base's."""
        return self._layers[name]

    def joint(self, name: str) -> bool:
        """Whether a layer is the joint projection of an ``nn.MultiheadAttention``, which is no layer of its own."""
        return name.endswith("in_proj") and any(name in found.fused for found in self.sets)

    def change(self, name: str) -> tuple[Tensor, Tensor | None]:
        """What is added to the base's weight and bias (none: nothing), in float32 or wider.

        A product of factors is formed apart from the base, beside which it may be too small for float32.
        """
        weight, bias = change(self.layer(name), self._entries(name))
        if factors := self.low_rank(name):
            down, up = (factor.double() for factor in factors)
            weight = (up @ down.flatten(1)).view_as(weight)
        return weight, bias

    def moves_bias(self, name: str) -> bool:
        """Whether anything is added to the bias."""
        bias = self.change(name)[1]
        return bias is not None and bool(bias.any())

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The change of the weight as two factors, where each of the sets has them: their factors side by side."""
        parts = [entry.adapter.low_rank(entry.owner.scale) for entry in self._entries(name)]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        return torch.cat([down for down, _ in found]), torch.cat([up for _, up in found], 1)

    def decomposed(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """Factors and lengths of rows of a layer with DoRA alone; none for other methods and for several groups."""
        first, *others = self._entries(name)
        if others or not isinstance(first.adapter, DoRA):
            return None
        return first.adapter.decomposed(self.layer(name).weight, first.owner.scale)

    def words(self) -> dict[str, dict[str, Tensor]]:
        """Word -> component -> the rows ``[n, d]`` that are looked up for it, as the sets leave them."""
        made: dict[str, dict[str, Tensor]] = {}
        for found in self.sets:
            for name, own in found.embeddings().items():
                for word, ids in own.words.items():
                    made.setdefault(word, {})[name.partition(".")[0]] = found.weight(name).detach()[ids].float().cpu()
        return made

    def merge(self) -> None:
        """Write all into the base."""
        for found in self.sets:
            found.merge()

    def _entries(self, name: str) -> list[Entry]:
        return [entry for entry in entries_of(self.layer(name)) if entry.owner in self.sets]
