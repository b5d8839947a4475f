"""NLoRA: LoRA with a trained square matrix between its factors, all three started from the weight itself.

"NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models", arXiv 2502.14482 (unverified). For r rows I
and r columns J of the weight, the Nyström approximation gives the start:

    W' = W + s (B N A - B_0 N_0 A_0),    A_0 = W[I, :],  B_0 = W[:, J],  N_0 = pinv(W[I, J])

With B = B_0 + b, N = N_0 + n, A = A_0 + a the same change is a sum in which every term has a difference from the start,

    B N A - B_0 N_0 A_0 = (b N + B_0 n) A + B_0 N_0 a

so that b, n and a are the parameters, zero at the start: nothing is subtracted from the base, the start is the base bit
for bit, and weight decay pulls to it. One LoRA of rank 2 r computes it. IntTune (``train: core``) trains n alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visiontune.adapters._layers import masters
from visiontune.adapters._low_rank import LAYERS, LowRank, matrices
from visiontune.adapters.base import Method
from visiontune.errors import UserError
from visiontune.schema import option

__all__ = ["LAYERS", "Config", "build"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of NLoRA; r (in + out + r) parameters for each linear layer, r r where the core alone is trained."""

    rank: int = option(16, least=1, greatest=16384, help="r, at most the smaller side of a weight")
    alpha: float | None = option(
        None, above=0, greatest=1e6, help="strength: the change is multiplied by alpha / rank; default: rank"
    )
    train: Literal["all", "core"] = option("all", help="all three matrices, or only the one in the middle (IntTune)")
    minor: Literal["pivoted", "leading"] = option("pivoted", help="rows and columns of the start: well apart, or first")
    rcond: float = option(
        1e-5, least=0, below=1, help="singular values of the minor below this share of the largest count as zero"
    )

    @property
    def strength(self) -> float:
        """s in the module's equation."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def build(config: Config, layers: Mapping[str, Any]) -> Method:
    """NLoRA for the layers of one component.

    Raises:
        UserError: a weight of zeros, with which all three matrices would stay at zero.
    """
    for name, layer in layers.items():
        if not layer.weight.any():
            raise UserError(f"the weight of '{name}' is zero, so that no start follows from it: narrow adapter.targets")
    return NLoRA({name: Nystrom(config, layer) for name, layer in layers.items()})


def pivots(w: Tensor, count: int) -> Tensor:
    """Numbers of ``count`` rows of ``w``, each the farthest from the span of those before: pivoted QR, cut short."""
    basis, left = w.new_zeros(count, w.shape[1]), w.square().sum(1)
    chosen = []
    for i in range(count):
        chosen.append(int(left.argmax()))
        row = w[chosen[-1]]
        for _ in range(2):  # once more for what rounding left
            row = row - (basis[:i] @ row) @ basis[:i]
        basis[i] = row / row.norm().clamp_min(torch.finfo(w.dtype).tiny)
        left = left - (w @ basis[i]).square()
        left[chosen] = -torch.inf
    return torch.tensor(chosen)


def choose(w: Tensor, rank: int, minor: str) -> tuple[Tensor, Tensor]:
    """Numbers of the rows I and columns J of ``w`` [out, d]."""
    if minor == "leading":
        return torch.arange(rank), torch.arange(rank)
    rows = pivots(w, rank)
    return rows, pivots(w[rows].T, rank)


class NLoRA(Method):
    """The changes of one component."""

    def fit(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Start from the saved rows and columns: the base at hand may be rounded, and choose others."""
        for name, tensors in saved.items():
            adapter = self.adapters[name]
            assert isinstance(adapter, Nystrom)
            if {"rows", "columns"} <= tensors.keys() and tensors["rows"].shape == adapter.rows.shape:
                adapter.start(tensors["rows"], tensors["columns"])


class Nystrom(LowRank):
    """One layer: ``down`` (a) [groups r, in, kernel ...], ``core`` (n) [groups, r, r] and ``up`` (b) [out, r].

    The start follows from the base weight and the numbers of its rows and columns, which alone are saved.
    """

    down: nn.Parameter | None
    up: nn.Parameter | None
    rows: Tensor
    columns: Tensor
    down_0: Tensor
    core_0: Tensor
    up_0: Tensor

    def __init__(self, config: Config, layer: Any) -> None:
        super().__init__(layer, config.strength)
        self.layer = [layer]  # in a list, lest the base become a submodule
        self.rcond, core_only = config.rcond, config.train == "core"
        parts = matrices(layer, layer.weight)
        rank = min(config.rank, *parts.shape[1:])
        rows, columns = zip(*(choose(part, rank, config.minor) for part in parts), strict=True)
        self.start(torch.stack(rows), torch.stack(columns))
        self.core = nn.Parameter(torch.zeros_like(self.core_0))
        self.register_parameter("down", None if core_only else nn.Parameter(torch.zeros_like(self.down_0)))
        self.register_parameter("up", None if core_only else nn.Parameter(torch.zeros_like(self.up_0)))

    def start(self, rows: Tensor, columns: Tensor) -> None:
        """Compute A_0, N_0 and B_0 for ``rows`` and ``columns`` [groups, r] of each group."""
        layer = self.layer[0]
        place, shape = masters(layer), layer.weight.shape
        pairs = list(zip(matrices(layer, layer.weight), rows.cpu(), columns.cpu(), strict=True))
        down = torch.cat([part[i] for part, i, _ in pairs]).reshape(-1, *shape[1:])
        core = torch.linalg.pinv(torch.stack([part[i][:, j] for part, i, j in pairs]), rtol=self.rcond)
        up = torch.cat([part[:, j] for part, _, j in pairs])
        for name, value in {"down_0": down, "core_0": core, "up_0": up}.items():
            self.register_buffer(name, value.to(**place), persistent=False)
        for name, value in {"rows": rows, "columns": columns}.items():
            self.register_buffer(name, value.to(place["device"]))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A over a, and b N + B_0 n beside B_0 N_0."""
        groups, r = self.groups, self.core.shape[1]
        up_0 = self.up_0.view(groups, -1, r)
        if self.down is None or self.up is None:
            return self.down_0, (up_0 @ self.core).flatten(0, 1)
        down, down_0 = (v.reshape(groups, r, -1) for v in (self.down, self.down_0))
        left = self.up.view(groups, -1, r) @ (self.core_0 + self.core) + up_0 @ self.core
        up = torch.cat([left, up_0 @ self.core_0], dim=2).flatten(0, 1)
        return torch.cat([down_0 + down, down], dim=1).view(-1, *self.down_0.shape[1:]), up

    def tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), "rows": self.rows, "columns": self.columns}
