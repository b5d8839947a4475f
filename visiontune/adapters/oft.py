"""OFT and COFT: a block-diagonal rotation of the inputs of each frozen weight.

Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280, equations 3 to 5; the
product on the input side is Qiu et al., "Orthogonal Finetuning Made Scalable", arXiv 2506.19847.

    W' = W R^T (so W' x = W (R^T x), x' = x R on rows),   R = diag(R_1 .. R_r),   R_i = (I + Q_i)(I - Q_i)^-1

Q_i is skew-symmetric and trained through its upper triangle v_i, which starts at zero. Row norms of W and all angles
between rows, hence the hyperspherical energy, stay as they are. A convolution's weight is flattened to
(out, in / groups x kernel) and every group has its own rotations.

COFT keeps ||Q_i||_F <= eps b^2 / sqrt(r) by a projection after each optimiser step; r is the number of trained
blocks of the layer. That is the radius of the authors' code: the paper's text bounds ||R - I|| by eps instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from visiontune.adapters._cayley import Bank, Cache, make_banks
from visiontune.adapters._layers import CONVOLUTIONS, compute_dtype, fan_in, masters
from visiontune.adapters._rotate import (
    kept_linear,
    rotate_channels,
    rotate_input,
    rotate_weight,
    rotated,
    rotated_linear,
)
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.errors import UserError
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
TOLERANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of OFT; d (b - 1) / 2 parameters for d inputs in blocks of b (d counts all groups of a convolution)."""

    block_size: int = option(
        32, least=2, greatest=65536, help="b; where it does not divide a layer's inputs, their largest divisor below it"
    )
    n_blocks: int | None = option(
        None, least=1, greatest=65536, help="r, blocks of each layer (of each group), instead of block_size; paper: 4"
    )
    coft: bool = option(False, help="bound the rotations (COFT)")
    eps: float = option(6e-5, above=0, greatest=1000, help="COFT radius before the factor b^2 / sqrt(r)")
    cayley: Literal["exact", "neumann"] = option("exact", help="exact rotations, or a truncated series")
    terms: int = option(5, least=3, greatest=100, help="terms of the series")
    block_share: bool = option(False, help="one rotation for all blocks of a layer")
    rescale: bool = option(False, help="train a factor for each output too")
    side: Literal["auto", "input", "weight"] = option("auto", help="what linear layers and 1x1 convolutions rotate")
    keep_rotated: bool = option(False, help="keep rotated linear weights for a whole step: faster, a copy of them")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """OFT for the layers of one component.

    Raises:
        UserError: ``n_blocks`` does not divide a layer's inputs, or a layer's inputs have no divisor up to
            ``block_size``.
    """
    return OFT(config, layers)


def block_size(config: Config, name: str, inputs: int) -> int:
    """b for a layer with ``inputs`` inputs (of one group)."""
    if config.n_blocks is not None:
        if inputs % config.n_blocks or inputs == config.n_blocks:
            wanted = f"adapter.n_blocks={config.n_blocks}"
            raise UserError(f"{wanted} does not fit the {inputs} inputs of '{name}': use adapter.block_size")
        return inputs // config.n_blocks
    size = next(b for b in range(min(config.block_size, inputs), 0, -1) if inputs % b == 0)
    if size == 1:
        raise UserError(
            f"'{name}' has {inputs} inputs, which no block of 2 to {config.block_size} divides: "
            "raise adapter.block_size or narrow adapter.targets"
        )
    return size


class OFT(Method):
    """The rotations of one component: a bank for each block size."""

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        sizes = {name: block_size(config, name, fan_in(layer)) for name, layer in layers.items()}
        smaller = [name for name, b in sizes.items() if config.n_blocks is None and b < config.block_size]
        if 2 * len(smaller) > len(sizes):  # an odd layer, as the first convolution, is as expected
            warnings.warn(
                f"{len(smaller)} layers have smaller blocks than adapter.block_size={config.block_size} "
                f"('{smaller[0]}': {sizes[smaller[0]]}), the largest that divide their inputs",
                stacklevel=2,
            )
        shapes = {n: (b, 1 if config.block_share else blocks(layers[n], b)) for n, b in sizes.items()}
        banks, where = make_banks(layers, shapes, config.terms if config.cayley == "neumann" else 0)
        gains = nn.ParameterList(new_gain(layer) for layer in layers.values() if config.rescale)
        super().__init__(
            {
                name: Rotation(config, layer, where[name], (gains, i) if config.rescale else None)
                for i, (name, layer) in enumerate(layers.items())
            }
        )
        self.config, self.banks, self.gains = config, banks, gains
        self._warned = False
        if config.cayley == "neumann":
            for bank in banks.values():
                assert isinstance(bank, Bank)
                bank.on_made = self._watch

    def rotations(self) -> list[Rotation]:
        """The adapters."""
        return [a for a in self.adapters.values() if isinstance(a, Rotation)]

    @torch.no_grad()
    def after_step(self, done: float = 0.0, optimizer: Optimizer | None = None) -> None:
        """COFT: scale every block that left its ball back onto it."""
        if not self.config.coft:
            return
        for bank in self.banks.values():
            assert isinstance(bank, Bank)
            radius = torch.tensor([coft_radius(self.config.eps, bank.b, r) for r in bank.counts for _ in range(r)])
            norm = 2**0.5 * torch.linalg.vector_norm(bank.v, dim=1)
            bank.v.mul_((radius.to(norm) / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)[:, None])

    def refresh(self) -> None:
        bank: Any
        for bank in self.banks.values():
            bank.refresh()
        for adapter in self.rotations():
            adapter.kept.clear()

    def _watch(self, rotation: Tensor) -> None:
        if self._warned:
            return
        error = orthogonality_error(rotation)
        if error > TOLERANCE:
            self._warned = True
            warnings.warn(
                f"the Neumann series left the rotations (error of R^T R: {error:.2g}): use adapter.cayley=exact, "
                "or a lower learning rate, smaller blocks or more terms",
                stacklevel=2,
            )


def coft_radius(eps: float, b: int, r: int) -> float:
    """Largest ||Q_i||_F of a layer with ``r`` trained blocks of size ``b``."""
    return eps * b**2 / r**0.5


def orthogonality_error(rotation: Tensor) -> float:
    """Largest entry of |R^T R - I| over blocks [n, b, b]."""
    identity = torch.eye(rotation.shape[-1], device=rotation.device, dtype=rotation.dtype)
    return float((rotation.mT @ rotation - identity).abs().max())


def new_gain(layer: Any) -> nn.Parameter:
    """The trained factor of each output minus one, [out]."""
    return nn.Parameter(torch.zeros(layer.weight.shape[0], **masters(layer)))


def blocks(layer: nn.Module, b: int) -> int:
    """Number of blocks of size ``b``, over all groups of a layer."""
    return int(getattr(layer, "groups", 1)) * fan_in(layer) // b


class Rotation(Adapter):
    """One layer's place in a bank and in the list of gains."""

    def __init__(
        self, config: Config, layer: nn.Module, bank: tuple[Bank, int], gain: tuple[nn.ParameterList, int] | None
    ) -> None:
        self.config, self._gain = config, gain
        self.bank, self.index = bank
        self.groups, self.blocks = int(getattr(layer, "groups", 1)), blocks(layer, self.bank.b)
        self.kept = Cache()

    @property
    def gain(self) -> Tensor | None:
        """The trained factor of each output minus one, [out]."""
        return None if self._gain is None else self._gain[0][self._gain[1]]

    def rotation(self, scale: float, dtype: torch.dtype) -> Tensor:
        """R [groups r, b, b]."""
        return self.bank.rotations(scale, dtype)[self.index].expand(self.blocks, -1, -1)

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``diag(1 + gain) W R^T``; a scale other than 1 multiplies Q and gain, so R stays orthogonal."""
        rotated = rotate_weight(w, self.rotation(scale, w.dtype), self.groups)
        if self.gain is None:
            return rotated
        return rotated * (1 + scale * self.gain).to(w.dtype).view(-1, *[1] * (w.dim() - 1))

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """``layer(x R)`` or ``(W R^T) x``, whichever is cheaper."""
        layer = beneath.layer
        if isinstance(layer, nn.Linear):
            return self._rescale(self._linear(x, beneath, scale), beneath.bias(), -1, scale)
        pointwise = all(k == 1 for k in layer.kernel_size) and x.dim() == layer.weight.dim()
        if pointwise and not self._weight_side(x.numel() // x.shape[1], beneath):
            # A rotation of channels at each place commutes with striding and padding.
            rotated = rotate_channels(x, self.rotation(scale, compute_dtype(x)))
            return self._rescale(beneath(rotated), beneath.bias(), 1, scale)
        return beneath.using(x, self.weight(beneath.weight(), scale))

    def tensors(self) -> dict[str, Tensor]:
        saved = {"v": self.bank.triangles()[self.index]}
        return saved if self.gain is None else {**saved, "gain": self.gain}

    def _linear(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        layer, dtype = beneath.layer, compute_dtype(x)
        plain = beneath.frozen and layer.weight.is_floating_point()
        keep = self.config.keep_rotated and self.config.cayley == "exact"
        if not plain or not (keep or self._weight_side(x.numel() // x.shape[-1], beneath)):
            return beneath(rotate_input(x.to(dtype), self.rotation(scale, dtype)))
        bias = None if layer.bias is None else layer.bias.to(dtype)
        if not keep:
            return rotated_linear(x.to(dtype), self.rotation(scale, dtype), layer.weight.to(dtype), bias)
        through = self.bank.through(scale, dtype)[self.index]
        kept = self._kept(layer.weight, through)
        return kept_linear(x.to(dtype), through.expand(self.blocks, -1, -1), kept, bias)

    def _kept(self, w: Tensor, rotation: Tensor) -> Tensor:
        """``W R^T``, made once for a version of both."""
        # The value holds `rotation`, so that no other tensor can come by its id.
        key = (id(rotation), id(w), w._version, w.data_ptr())
        return self.kept.get(key, lambda: (self._rotated(w, rotation), rotation))[0]

    def _rotated(self, w: Tensor, rotation: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return rotated(w.to(rotation.dtype), rotation.expand(self.blocks, -1, -1))

    def _weight_side(self, tokens: int, beneath: Beneath) -> bool:
        """Rotating the weight costs ``out`` rows, rotating the input ``tokens`` rows."""
        if self.config.side != "auto":
            return self.config.side == "weight"
        if not isinstance(beneath.layer, nn.Linear) and torch.is_grad_enabled():
            # Autograd would compute the whole gradient of a convolution's weight.
            return False
        return tokens > beneath.layer.weight.shape[0]

    def _rescale(self, y: Tensor, bias: Tensor | None, dim: int, scale: float) -> Tensor:
        if self.gain is None:
            return y
        shape: list[Any] = [1] * y.dim()
        shape[dim] = -1
        # Added to y rather than multiplied, so that a gain of zero changes no bit.
        linear = y if bias is None else y - bias.to(y.dtype).view(shape)
        return y + (scale * self.gain).to(y.dtype).view(shape) * linear
