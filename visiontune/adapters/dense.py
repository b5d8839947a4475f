"""Dense: a trained change of whole weights and biases, of the layers that ``targets`` names.

Full fine-tuning of a part of a model with an adapter's comforts: the base stays as it was, so the change can be
switched off, scaled, saved alone and merged. ``subtuning`` chooses blocks for it.

    W' = W + scale D,   b' = b + scale d,   D and d start at zero

With ``rounds`` it is half fine-tuning (Hui et al., "HFT: Half Fine-Tuning for Large Language Models", arXiv
2404.18466): the run is cut into rounds, and in each a newly drawn half of the layers of every kind (all ``to_q``, all
``conv1`` ...) holds still.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from visiontune.adapters._layers import CONVOLUTIONS, NORMS, masters
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *NORMS, nn.Embedding)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of dense changes; as many parameters as the layers have."""

    biases: bool = option(True, help="train the biases of the layers too")
    rounds: int = option(
        0, least=0, greatest=1_000_000, help="half fine-tuning in that many rounds; 0 trains everything all the time"
    )
    seed: int = option(0, least=0, greatest=2**63 - 1, help="seed of the halves")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """Dense changes for the layers of one component."""
    return Dense(config, layers)


def half(names: list[str], seed: int, turn: int) -> set[str]:
    """The layers that hold still in a round: of each kind (the name's last word) one half, the odd one by turns."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        words = [word for word in name.split(".") if not word.isdigit()]
        kinds.setdefault(words[-1] if words else "", []).append(name)
    still: set[str] = set()
    for i, members in enumerate(kinds.values()):
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed + 1009 * turn + 9176 * i))
        still |= {members[int(k)] for k in order[: (len(members) + (turn + i) % 2) // 2]}
    return still


class Dense(Method):
    """The changes of one component, and which of them hold still."""

    turn: Tensor

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        changes = {name: Change(config, layer) for name, layer in layers.items()}
        super().__init__(changes)
        self.config, self.changes = config, changes
        self.register_buffer("turn", torch.tensor(0))

    @property
    def still(self) -> set[str]:
        """Names of the layers that hold still now."""
        return half(list(self.changes), self.config.seed, int(self.turn)) if self.config.rounds else set()

    def before_step(self, step: int = 0, loss_scale: float = 1.0) -> None:
        """Optimisers pass over parameters without a gradient, so those do not even decay."""
        for name in self.still:
            for parameter in self.changes[name].parameters():
                parameter.grad = None

    def after_step(self, done: float = 0.0, optimizer: Optimizer | None = None) -> None:
        """The next round, in which those that hold still need no optimiser state."""
        turn = min(int(done * self.config.rounds), self.config.rounds - 1)
        if not self.config.rounds or turn == int(self.turn):
            return
        self.turn.fill_(turn)
        if optimizer is not None:
            for name in self.still:
                for parameter in self.changes[name].parameters():
                    optimizer.state.pop(parameter, None)


class Change(nn.Module, Adapter):
    """One layer's ``change``, of its weight's shape, and ``shift``, of its bias's."""

    shift: nn.Parameter | None

    def __init__(self, config: Config, layer: Any) -> None:
        super().__init__()
        bias = getattr(layer, "bias", None) if config.biases else None
        self.change = nn.Parameter(torch.zeros(layer.weight.shape, **masters(layer)))
        self.register_parameter(
            "shift", None if bias is None else nn.Parameter(torch.zeros(bias.shape, **masters(layer)))
        )

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``w + scale D``."""
        return w + (scale * self.change).to(w.dtype)

    def bias(self, b: Tensor | None, scale: float) -> Tensor | None:
        """``b + scale d``."""
        return b if b is None or self.shift is None else b + (scale * self.shift).to(b.dtype)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """One product with the changed weight."""
        return beneath.using(x, self.weight(beneath.weight(), scale), self.bias(beneath.bias(), scale))

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())
