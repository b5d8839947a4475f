"""MoS: LoRA factors put together from shards of pools that all layers of one shape share.

Wang et al., "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards", arXiv 2410.00938
(unverified).

    W' = W + s B A,    row i of A = shards of pool P_A side by side,    column i of B = shards of pool P_B likewise

Which shards is drawn once and then fixed, for A and for B apart. Each pool is as large as the factors of LoRAs of rank
``equivalent_rank`` in all those layers would be, while every layer has ``rank`` rows and columns. A share of the pool
is private: each of these shards belongs to one layer, which uses it once. The rest is dealt out like cards from a
shuffled pack, and a new one when it is used up, so that no shard is idle. P_B starts at zero.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.adapters._layers import masters
from visiontune.adapters._low_rank import LAYERS, LowRank
from visiontune.adapters.base import Method
from visiontune.errors import UserError
from visiontune.schema import option

__all__ = ["LAYERS", "Config", "build"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of MoS; as many parameters as LoRA of rank ``equivalent_rank``."""

    rank: int = option(16, least=1, greatest=16384, help="r, the rank of the change of each weight")
    equivalent_rank: int = option(
        2, least=1, greatest=16384, help="the pools hold as many parameters as LoRA of this rank; at most rank"
    )
    shards: int = option(
        4,
        least=1,
        greatest=65536,
        help="l, into how many shards a row of A or a column of B is cut, or fewer that divide it",
    )
    private: float = option(
        0.25, least=0, below=1, help="share of the pools, rounded down, whose shards belong to one layer; in [0, 1)"
    )
    alpha: float | None = option(
        None, above=0, greatest=1e6, help="strength: the change is multiplied by alpha / rank; default: rank"
    )
    seed: int = option(0, least=0, greatest=2**63 - 1, help="of the choice of shards")

    def __post_init__(self) -> None:
        if self.equivalent_rank > self.rank:
            raise ValueError("equivalent_rank must be at most rank")

    @property
    def strength(self) -> float:
        """s in the module's equation."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """MoS for the layers of one component."""
    return MoS(config, layers)


def deal(config: Config, cuts: int, users: int, seed: str) -> tuple[Tensor, int]:
    """Which shards each user (a layer, or a group of one) puts together, and how many shards the pool has.

    Args:
        cuts: into how many shards a vector is cut. users: how many share the pool. seed: of the draw.

    Returns:
        Numbers of shards [users, r, cuts]. Those of user u's private ones are u p ... (u + 1) p - 1.
    """
    rng = torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {seed}".encode()))
    each = config.equivalent_rank * cuts
    own = int(config.private * each + 1e-9)
    shared, wanted = users * (each - own), config.rank * cuts - own
    packs = [torch.randperm(shared, generator=rng) for _ in range(math.ceil(users * wanted / shared))]
    drawn = torch.cat(packs)[: users * wanted].view(users, wanted) + users * own
    private = torch.arange(users * own).view(users, own)
    hands = [hand[torch.randperm(len(hand), generator=rng)] for hand in torch.cat([private, drawn], dim=1)]
    return torch.stack(hands).view(users, config.rank, cuts), users * each


class Pool(nn.Module):
    """``down`` (P_A) [shards, in x kernel / l] and ``up`` (P_B) [shards, out / l]."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)


class MoS(Method):
    """The pools of one component, one for each shape of a weight."""

    def __init__(self, config: Config, layers: Mapping[str, Any]) -> None:
        alike: dict[tuple, list[str]] = {}
        for name, layer in layers.items():
            alike.setdefault((*layer.weight.shape, getattr(layer, "groups", 1)), []).append(name)
        mixtures: dict[str, Mixture] = {}
        for (*shape, groups), names in alike.items():
            inputs, outputs, users = math.prod(shape[1:]), shape[0] // groups, groups * len(names)
            cut_in, cut_out = (max(n for n in range(1, config.shards + 1) if d % n == 0) for d in (inputs, outputs))
            down, n_down = deal(config, cut_in, users, f"down {shape}")
            up, n_up = deal(config, cut_out, users, f"up {shape}")
            bound, place = 1 / math.sqrt(inputs), masters(layers[names[0]])
            shards = torch.empty(n_down, inputs // cut_in, **place).uniform_(-bound, bound)
            pool = Pool(shards, torch.zeros(n_up, outputs // cut_out, **place))
            for i, name in enumerate(names):
                mine = slice(i * groups, (i + 1) * groups)
                mixtures[name] = Mixture(config, layers[name], pool, down[mine], up[mine], first=i == 0)
        super().__init__({name: mixtures[name] for name in layers})
        self.mixtures, self.pools = mixtures, nn.ModuleList(m.pool for m in mixtures.values() if m.first)

    def fit(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make the pools as large as the saved ones, which may have served further layers.

        Raises:
            UserError: the layer that a pool was saved with is missing here.
        """
        for name, tensors in saved.items():
            mixture = self.mixtures[name]
            if not mixture.first:
                continue
            if not {"pool_down", "pool_up"} <= tensors.keys():
                raise UserError(f"the file has the shards of '{name}' with a layer that is missing here: load them all")
            for side, pool in (("down", mixture.pool.down), ("up", mixture.pool.up)):
                if pool.shape != tensors[f"pool_{side}"].shape:
                    setattr(mixture.pool, side, nn.Parameter(pool.new_zeros(tensors[f"pool_{side}"].shape)))


class Mixture(LowRank):
    """One layer's hands, ``index_down`` and ``index_up`` [groups r, l], numbers of shards in its pool.

    The first layer of a pool saves the pool too.
    """

    index_down: Tensor
    index_up: Tensor

    def __init__(self, config: Config, layer: Any, pool: Pool, down: Tensor, up: Tensor, first: bool) -> None:
        super().__init__(layer, config.strength)
        self.shape, self.first = layer.weight.shape, first
        self._pool = [pool]  # in a list, since it is the method's submodule
        for name, hands in {"index_down": down, "index_up": up}.items():
            self.register_buffer(name, hands.flatten(0, 1).to(layer.weight.device))

    @property
    def pool(self) -> Pool:
        """The shards."""
        return self._pool[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B with their shards in place."""
        down = F.embedding(self.index_down, self.pool.down).view(-1, *self.shape[1:])
        up = F.embedding(self.index_up, self.pool.up).flatten(1)
        return down, up.view(self.groups, -1, up.shape[1]).mT.flatten(0, 1)

    def tensors(self) -> dict[str, Tensor]:
        pool = {"pool_down": self.pool.down, "pool_up": self.pool.up} if self.first else {}
        return {**pool, "index_down": self.index_down, "index_up": self.index_up}
