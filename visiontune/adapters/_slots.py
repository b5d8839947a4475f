"""Adapters that are chosen after the set was built: of another kind, of another rank, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from visiontune.adapters import lora
from visiontune.adapters._layers import Beneath, fan_in
from visiontune.adapters.base import Adapter, Method
from visiontune.errors import UserError
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(lora.Config):
    """Options of LoRA, and how much of the task is looked at."""

    batches: int = option(16, least=1, greatest=1_000_000, help="number of batches to look at before training")

    def __post_init__(self) -> None:
        if self.dora:
            raise ValueError("dora does not go with planned adapters")


class Slot(nn.Module, Adapter):
    """One layer's place for an adapter; without one the layer is the base's, at no cost."""

    inner: Any

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner

    @property
    def random(self) -> bool:
        """That of what is here."""
        return self.inner is not None and self.inner.random

    def put(self, inner: nn.Module | None) -> None:
        """Replace what is here."""
        self.inner = None if inner is None else inner.train(self.training)

    def weight(self, w: Tensor, scale: float) -> Tensor:
        return w if self.inner is None else self.inner.weight(w, scale)

    def bias(self, b: Tensor | None, scale: float) -> Tensor | None:
        return b if self.inner is None else self.inner.bias(b, scale)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        return beneath(x) if self.inner is None else self.inner(x, beneath, scale)

    def low_rank(self, scale: float) -> tuple[Tensor, Tensor] | None:
        return None if self.inner is None else self.inner.low_rank(scale)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.inner is None else self.inner.tensors()


class Slots(Method):
    """A slot for each layer, at first with LoRAs of ``config.rank``.

    The strength s is the same at every rank, since a layer's rank says how much of it may move and not how far.
    """

    plans = True

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        self.slots = {name: Slot(factors(config, layer, config.rank)) for name, layer in layers.items()}
        super().__init__(self.slots)
        self.config, self.layers = config, dict(layers)

    def put_ranks(self, ranks: Mapping[str, int]) -> None:
        """Fresh LoRAs of these ranks; 0 is none.

        Raises:
            UserError: there would be none at all.
        """
        if not any(ranks.values()):
            raise UserError("no layer would be adapted: raise adapter.rank")
        for name, rank in ranks.items():
            self.slots[name].put(factors(self.config, self.layers[name], rank) if rank else None)

    def fit(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the saved adapters' kinds and shapes; a layer without tensors has none."""
        for name, slot in self.slots.items():
            slot.put(self.like(name, saved.get(name, {})))

    def like(self, name: str, saved: Mapping[str, Tensor]) -> nn.Module | None:
        """The adapter of a layer that such tensors can be copied into."""
        return factors(self.config, self.layers[name], saved["up"].shape[1]) if "up" in saved else None


def factors(config: Config, layer: nn.Module, rank: int) -> lora.LoRA:
    """A LoRA of a rank with the strength of the config's."""
    made = lora.LoRA(lora.Config(rank=rank, dropout=config.dropout), layer)
    made.strength = config.strength
    return made


def rank_cost(layer: Any) -> int:
    """Parameters of each rank of a LoRA."""
    return int(getattr(layer, "groups", 1)) * fan_in(layer) + int(layer.weight.shape[0])
