"""MoSA: a LoRA whose second factor is split among experts while it is trained, and merged afterwards.

Zhang et al., "Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training", arXiv 2312.02923, in its
LoRA form with a shared first factor.

    training:    B_i = m_i * B       i drawn for each layer and forward pass; the masks m_i part the entries of B
    afterwards:  B' = (1/N) sum_i B_i = B / N

All experts start from B = 0 and each owns its entries, so one tensor of B's size holds them all, and what is stored is
no larger than a LoRA. The paper's second forward pass, whose outputs are held together by a divergence, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visiontune.adapters import lora
from visiontune.adapters._layers import CONVOLUTIONS
from visiontune.adapters.base import Method
from visiontune.errors import UserError
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class Config(lora.Config):
    """Options of LoRA and the number of experts; as many parameters as LoRA."""

    experts: int = option(
        4, least=1, greatest=16384, help="N, into how many parts the second factor is split while training"
    )

    def __post_init__(self) -> None:
        if self.dora:
            raise ValueError("dora does not go with split factors")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """MoSA for the layers of one component.

    Raises:
        UserError: more experts than a layer's second factor has entries.
    """
    adapters = {name: Split(config, layer) for name, layer in layers.items()}
    for name, adapter in adapters.items():
        if (entries := adapter.up.numel()) < config.experts:
            raise UserError(f"'{name}' has {entries} entries to split, fewer than adapter.experts={config.experts}")
    return Method(adapters)


class Split(lora.LoRA):
    """One layer's factors, and to which expert each entry of the second belongs."""

    owner: Tensor

    def __init__(self, config: Config, layer: nn.Module) -> None:
        super().__init__(config, layer)
        self.experts = config.experts
        order = torch.randperm(self.up.numel())
        self.register_buffer("owner", (order % config.experts).view(self.up.shape).to(self.up.device))

    @property
    def random(self) -> bool:
        """Whether there are experts to draw, or inputs to drop."""
        return self.experts > 1 or super().random

    def final_up(self) -> Tensor:
        """The mean over the experts."""
        return self.up / self.experts

    def active_up(self) -> Tensor:
        """That of an expert drawn now while training, the mean otherwise."""
        if not self.training:
            return self.final_up()
        return torch.where(self.owner == torch.randint(self.experts, ()).item(), self.up, 0.0)

    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}
