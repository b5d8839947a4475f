"""BOFT: a rotation of the inputs that is a product of sparse butterfly factors.

Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", ICLR 2024, arXiv 2311.06243,
sections 4 and 5.

    W' = W R^T,   x R = x B_(m-1) .. B_1 B_0,   B_j = P_j blockdiag(R_j1 .. R_jD) P_j^T,   R_ji exact Cayley of Q_ji

P_j puts beside each half-block (b / 2 inputs) the one that lies 2^j half-blocks further, in runs of b 2^j inputs. One
factor is OFT with the same blocks; m = log2(2 d / b) factors reach every input from every other. Fewer leave R
block-diagonal, with blocks of b 2^(m-1): where these are small, a linear layer multiplies the factors first and is OFT
with such blocks. Permutations are transposed views here, and no d x d matrix exists. Permutations and order are those
of the authors' code in PEFT.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visiontune.adapters._cayley import Bank, make_banks
from visiontune.adapters._layers import CONVOLUTIONS, compute_dtype, fan_in
from visiontune.adapters._rotate import blocks_of, rotate_input, rotate_weight, rotated_linear
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.adapters.oft import blocks, new_gain
from visiontune.errors import UserError
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of BOFT; m d (b - 1) / 2 parameters for d inputs (of all groups of a convolution)."""

    block_size: int = option(
        8,
        least=2,
        greatest=65536,
        multiple=2,
        help="b, even; where it does not divide a layer's inputs, their largest even divisor",
    )
    factors: int = option(
        2, least=1, greatest=64, help="m; layers whose inputs b 2^(m-1) does not divide get the most that fit"
    )
    dropout: float = option(
        0.0, least=0, below=1, help="probability of leaving a block out (as identity) while training"
    )
    rescale: bool = option(False, help="train a factor for each output too")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """BOFT for the layers of one component.

    Raises:
        UserError: a layer has an odd number of inputs.
    """
    return BOFT(config, layers)


def shape(config: Config, name: str, inputs: int) -> tuple[int, int]:
    """(b, m) for a layer with ``inputs`` inputs (of one group)."""
    if inputs % 2:
        raise UserError(f"'{name}' has {inputs} inputs, which no even block divides: narrow adapter.targets")
    b = next(b for b in range(min(config.block_size, inputs), 0, -2) if b % 2 == 0 and inputs % b == 0)
    m = next(m for m in range(config.factors, 0, -1) if inputs % (b * 2 ** (m - 1)) == 0)
    return b, m


class BOFT(Method):
    """The factors of one component: a bank for each block size."""

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        shapes = {name: shape(config, name, fan_in(layer)) for name, layer in layers.items()}
        fewer = [name for name, (_, m) in shapes.items() if m < config.factors]
        if fewer:
            warnings.warn(
                f"{len(fewer)} layers have fewer factors than adapter.factors={config.factors} "
                f"('{fewer[0]}': {shapes[fewer[0]][1]}), as many as divide their inputs",
                stacklevel=2,
            )
        counts = {name: (b, m * blocks(layers[name], b)) for name, (b, m) in shapes.items()}
        banks, where = make_banks(layers, counts)
        gains = nn.ParameterList(new_gain(layer) for layer in layers.values() if config.rescale)
        super().__init__(
            {
                name: Butterfly(self, config, layer, where[name], (gains, i) if config.rescale else None)
                for i, (name, layer) in enumerate(layers.items())
            }
        )
        self.banks, self.gains = banks, gains

    def refresh(self) -> None:
        bank: Any
        for bank in self.banks.values():
            bank.refresh()


class Butterfly(Adapter):
    """One layer's factors."""

    def __init__(
        self,
        method: BOFT,
        config: Config,
        layer: nn.Module,
        bank: tuple[Bank, int],
        gain: tuple[nn.ParameterList, int] | None,
    ) -> None:
        self.method, self.dropout, self._gain = method, config.dropout, gain
        self.bank, self.index = bank
        self.groups, self.blocks = int(getattr(layer, "groups", 1)), blocks(layer, self.bank.b)

    @property
    def gain(self) -> Tensor | None:
        """The trained factor of each output minus one, [out]."""
        return None if self._gain is None else self._gain[0][self._gain[1]]

    def factors(self, scale: float, dtype: torch.dtype) -> Tensor:
        """R_ji [m, groups D, b, b]; a scale other than 1 multiplies Q, so they stay orthogonal."""
        return self.bank.rotations(scale, dtype)[self.index].unflatten(0, (-1, self.blocks))

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``diag(1 + gain) W R^T``."""
        return self._turned(w, self.factors(scale, w.dtype), scale)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """``layer(x R)`` for few tokens, ``(W R^T) x`` for many and for convolutions."""
        dtype = compute_dtype(x)
        factors = self._dropped(self.factors(scale, dtype))
        if self.gain is None and isinstance(beneath.layer, nn.Linear):
            return self._linear(x.to(dtype), factors, beneath, scale)
        return self._by_weight(x, factors, beneath, scale)

    def _linear(self, x: Tensor, factors: Tensor, beneath: Beneath, scale: float) -> Tensor:
        layer: Any = beneath.layer
        tokens, run = x.numel() // x.shape[-1], reach(factors)
        many = tokens > layer.out_features
        # Its product costs as many rows as it has, and each product with it that many columns.
        if tokens > run and 2 * run <= layer.out_features:
            whole = product(factors)
            if many and beneath.frozen and layer.weight.is_floating_point():
                bias = None if layer.bias is None else layer.bias.to(x.dtype)
                return rotated_linear(x, whole, layer.weight.to(x.dtype), bias)
            return beneath(rotate_input(x, whole))
        return self._by_weight(x, factors, beneath, scale) if many else beneath(turn_input(x, factors))

    def _by_weight(self, x: Tensor, factors: Tensor, beneath: Beneath, scale: float) -> Tensor:
        w = beneath.weight().to(factors.dtype)
        # What lies between two factors is as large as the weight: made again in the backward pass, not kept.
        turned = checkpoint(self._turned, w, factors, scale, use_reentrant=False, preserve_rng_state=False)
        return beneath.using(x, turned)

    def tensors(self) -> dict[str, Tensor]:
        saved = {"v": self.bank.triangles()[self.index]}
        return saved if self.gain is None else {**saved, "gain": self.gain}

    def _turned(self, w: Tensor, factors: Tensor, scale: float) -> Tensor:
        turned = turn_weight(w, factors, self.groups)
        if self.gain is None:
            return turned
        return turned * (1 + scale * self.gain).to(w.dtype).view(-1, *[1] * (w.dim() - 1))

    def _dropped(self, factors: Tensor) -> Tensor:
        if not (self.dropout and self.method.training):
            return factors
        keep = torch.rand(factors.shape[:2], device=factors.device) >= self.dropout
        identity = torch.eye(factors.shape[-1], device=factors.device, dtype=factors.dtype)
        return torch.where(keep[..., None, None], factors, identity)


def reach(factors: Tensor) -> int:
    """How many inputs in a row the product of ``factors`` [m, D, b, b] mixes: b 2^(m-1)."""
    return int(factors.shape[-1]) << len(factors) - 1


def product(factors: Tensor) -> Tensor:
    """The blocks [d / n, n, n] of ``B_(m-1) .. B_0``, which is block-diagonal with n = :func:`reach`."""
    m, count, b = factors.shape[:3]
    n, d = reach(factors), count * b
    if m == 1:
        return factors[0]
    rows = torch.eye(n, device=factors.device, dtype=factors.dtype).repeat(1, d // n)
    return blocks_of(turn_input(rows, factors), d // n)


def turn_input(x: Tensor, factors: Tensor) -> Tensor:
    """``x B_(m-1) .. B_0`` for x [..., d], factors [m, D, b, b]."""
    b = factors.shape[-1]
    for level in reversed(range(len(factors))):
        x = _unshuffled(rotate_input(_shuffled(x, level, b), factors[level]), level, b)
    return x


def turn_weight(w: Tensor, factors: Tensor, groups: int = 1) -> Tensor:
    """``W R^T`` for w [out, in / groups, ...], factors [m, groups D, b, b]."""
    rows, b = w.reshape(w.shape[0], -1), factors.shape[-1]
    for level, rotation in enumerate(factors):
        rows = _unshuffled(rotate_weight(_shuffled(rows, level, b), rotation, groups), level, b)
    return rows.reshape(w.shape)


def _shuffled(x: Tensor, level: int, b: int) -> Tensor:
    """x P_j: half-blocks of the first and of the second half of each run by turns."""
    return x.unflatten(-1, (-1, 2, 2**level, b // 2)).transpose(-3, -2).reshape(x.shape) if level else x


def _unshuffled(x: Tensor, level: int, b: int) -> Tensor:
    return x.unflatten(-1, (-1, 2**level, 2, b // 2)).transpose(-3, -2).reshape(x.shape) if level else x
