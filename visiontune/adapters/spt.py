"""SPT: parameters where the task is sensitive, as LoRAs or as single entries.

He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023, arXiv 2303.08566, section 3.

    s_n = sum over batches of (dL/dw_n)^2

is, but for the learning rate, what one gradient step on the entry n alone would lower the loss by. The tau entries of
greatest s over the whole component decide: a matrix that holds at least p_LoRA / alpha of them gets a LoRA of p_LoRA
parameters, any other trains just its own in place, and one that holds none stays frozen. tau is the largest that the
budget pays for; with ``lora_from`` above 1, where a LoRA may cost less than the entries that ask for it, one of those
after which the next entry would cost too much. Entries of zero sensitivity are never chosen, and equal ones in the
order of layers and places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visiontune.adapters import _slots
from visiontune.adapters._budget import largest
from visiontune.adapters._evidence import Evidence
from visiontune.adapters._layers import CONVOLUTIONS
from visiontune.adapters._slots import Slots, factors, rank_cost
from visiontune.adapters._sparse import Entries
from visiontune.adapters.base import Method
from visiontune.errors import UserError
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class Config(_slots.Config):
    """Options of SPT and of its LoRAs; at most budget x entries parameters, and short of it by less than one LoRA."""

    rank: int = option(
        8, least=1, greatest=16384, help="r of the LoRAs, which are in all layers until SPT has seen the task"
    )
    budget: float = option(
        0.005, above=0, greatest=1, help="parameters to train, as a share of the entries of each component's layers"
    )
    lora_from: float = option(
        0.1,
        least=0,
        greatest=math.inf,
        help="1/alpha: a LoRA where so many sensitive entries as this share of its parameters; .inf: no LoRA",
    )


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """SPT for the layers of one component: LoRA until it is prepared."""
    return SPT(config, layers)


class SPT(Slots):
    """LoRAs, chosen entries or nothing for each layer of one component."""

    config: Config

    def prepare(self, evidence: Evidence) -> None:
        """Choose by the squared gradients.

        Raises:
            UserError: the budget pays for nothing, or nothing is sensitive.
        """
        scores = evidence.squares()
        budget = round(self.config.budget * sum(score.numel() for score in scores.values()))
        chosen = largest(scores, budget, self.cost)
        if not any(len(index) for index in chosen.values()):
            raise UserError(f"adapter.budget pays for {budget} parameters, and SPT found no use for them: raise it")
        for name, index in chosen.items():
            layer = self.layers[name]
            if self.structured(name, len(index)):
                self.slots[name].put(factors(self.config, layer, self.config.rank))
            else:
                self.slots[name].put(Entries(layer, index, index[:0]) if len(index) else None)

    def structured(self, name: str, count: int) -> bool:
        """Whether ``count`` sensitive entries make it a LoRA; never where that is no smaller than the weight."""
        layer, size = self.layers[name], self.size(name)
        assert isinstance(layer.weight, Tensor)
        return count > 0 and count >= self.config.lora_from * size and size < layer.weight.numel()

    def size(self, name: str) -> int:
        """Parameters of a layer's LoRA."""
        return self.config.rank * rank_cost(self.layers[name])

    def cost(self, counts: Mapping[str, int]) -> int:
        """Parameters if so many entries of each layer are the sensitive ones."""
        return sum(self.size(name) if self.structured(name, count) else count for name, count in counts.items())

    def like(self, name: str, saved: Mapping[str, Tensor]) -> nn.Module | None:
        """Saved entries bring their places."""
        if "index" in saved:
            none = torch.zeros(0, dtype=torch.int64)
            return Entries(self.layers[name], saved["index"], saved.get("bias_index", none))
        return super().like(name, saved)
