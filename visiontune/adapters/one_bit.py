"""One-bit adapters: a LoRA whose factors take only two values each while it is trained and in the file.

Jie, Wang and Deng, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
ICCV 2023, arXiv 2307.16867, in its LoRA form.

    W' = W + s B_q A_q,    M_q = mu + sigma Q((M - mu) / sigma),   mu and sigma being those of M's entries

Q rounds to the 2^bits values that are best for a normal distribution, and gradients take it for the identity; so M,
which is trained in full precision, moves M_q only by what crosses a boundary, or moves mu and sigma.

Zeros cannot be standardised, so the start is not B = 0: both halves of A start equal and those of B opposite, and

    B_q A_q = 1/2 (B1 + B2) (A1 + A2) + 1/2 (B1 - B2) (A1 - A2)

has a factor of zeros in both of its terms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from visiontune.adapters import _bits, lora
from visiontune.adapters._layers import CONVOLUTIONS, fan_in, masters
from visiontune.adapters.base import Method
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
_STEPS = 2**12  # mu and sigma are rounded to this share of sigma


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of one-bit adapters; as many trained parameters as LoRA, ``bits`` bits of each in the file."""

    bits: Literal[1, 2, 4, 8] = option(1, help="bits of each entry of the factors")
    rank: int = option(32, least=2, greatest=16384, multiple=2, help="r, the rank of the change of each weight; even")
    alpha: float | None = option(
        None, above=0, greatest=1e6, help="strength: the change is multiplied by alpha / rank; default: rank"
    )
    loss: Literal["l1", "mse"] = option("l1", help="what rounding keeps small: the mean absolute or squared error")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """One-bit adapters for the layers of one component."""
    return Method({name: OneBit(config, layer) for name, layer in layers.items()})


@functools.cache
def codebook(bits: int, loss: str) -> tuple[Tensor, Tensor]:
    """The positive half of the best 2^bits values for N(0, 1), ascending, and the boundaries between them (float64).

    Boundaries lie half-way between values, and a value is its cell's median (``l1``) or mean (``mse``); the two are
    found by turns.
    """
    n = 2 ** (bits - 1)
    share = (torch.arange(n, dtype=torch.float64) + 0.5) / (2 * n)
    # Fine codebooks follow a wider normal distribution, from where few turns are left to go.
    values = math.sqrt(2 if loss == "l1" else 3) * torch.special.ndtri(0.5 + share)
    for _ in range(20_000):
        between = (values[1:] + values[:-1]) / 2
        edges = torch.cat([between.new_zeros(1), between, between.new_full((1,), math.inf)])
        above = torch.special.ndtr(-edges)
        if loss == "l1":
            new = -torch.special.ndtri((above[1:] + above[:-1]) / 2)
        else:
            density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
            new = (density[:-1] - density[1:]) / (above[:-1] - above[1:])
        moved = float((new - values).abs().max())
        values = new
        if moved < 1e-13:
            break
    return values, (values[1:] + values[:-1]) / 2


@functools.cache
def codebook_on(bits: int, loss: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`codebook` where it is used, since every forward pass of every layer asks for it."""
    # Whatever mode the first caller is in, a later one may train.
    with torch.inference_mode(False):
        values, between = codebook(bits, loss)
        return values.to(device, dtype), between.to(device, dtype)


class Quantised(nn.Module):
    """``latent`` [2, ...], trained, and the few values that it is rounded to.

    ``shift`` and ``stretch`` are 0 and 1 but in what comes from a file, which has mu and sigma and no latent values:
    there the rounded values stand in, and these two correct their mean and deviation.
    """

    shift: Tensor
    stretch: Tensor

    def __init__(self, latent: Tensor, bits: int, loss: str) -> None:
        super().__init__()
        self.latent, self.bits, self.loss = nn.Parameter(latent), bits, loss
        self.register_buffer("shift", latent.new_zeros(()))
        self.register_buffer("stretch", latent.new_ones(()))

    def _own_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of ``latent``."""
        # Halves that are opposite have a mean of exactly zero.
        mean = (self.latent[0] + self.latent[1]).mean() / 2
        variance = (self.latent - mean).square().sum() / (self.latent.numel() - 1)
        # The bound is for entries that are all equal.
        return mean, variance.sqrt().clamp_min(1e-12)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """mu and sigma, rounded: those of a file are then met to the last bit, in whatever order they are summed."""
        mean, std = self._own_statistics()
        mean, std = mean + self.shift, std * self.stretch
        fraction, exponent = torch.frexp(std.detach())
        std = straight(std, torch.ldexp((fraction * _STEPS).round() / _STEPS, exponent))
        return straight(mean, (mean / std * _STEPS).round() / _STEPS * std), std

    def value(self) -> Tensor:
        """The rounded values, in the shape of ``latent``; gradients pass to it straight through the rounding."""
        mean, std = self.statistics()
        z = (self.latent - mean) / std
        values, between = codebook_on(self.bits, self.loss, z.device, z.dtype)
        # Signs apart, so that opposite numbers stay opposite on boundaries and at zero too.
        return mean + std * straight(z, torch.copysign(values[torch.bucketize(z.detach().abs(), between)], z))

    @torch.no_grad()
    def packed(self) -> tuple[Tensor, Tensor]:
        """The entries' codes in bytes, and [mu, sigma]."""
        mean, std = self.statistics()
        z = (self.latent - mean) / std
        level = torch.bucketize(z.abs(), codebook(self.bits, self.loss)[1].to(z))
        codes = level + torch.signbit(z) * 2 ** (self.bits - 1)
        return _bits.pack(codes, self.bits), torch.stack([mean, std])

    @torch.no_grad()
    def unpack(self, codes: Tensor, statistics: Tensor) -> None:
        """Take on values of a file."""
        signed = _bits.unpack(codes, self.bits, self.latent.shape).long()
        half = 2 ** (self.bits - 1)
        z = codebook(self.bits, self.loss)[0].to(self.latent)[signed % half] * torch.where(signed < half, 1, -1)
        mean, std = statistics.to(self.latent)
        self.latent.copy_(mean + std * z)
        own_mean, own_std = self._own_statistics()
        self.shift.copy_(mean - own_mean)
        self.stretch.copy_(std / own_std)


def straight(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded`` to the bit, with the gradient of ``x``."""
    return rounded.detach() + (x - x.detach())


class OneBit(lora.LoRA):
    """A layer's factors ``first`` [2, groups, r / 2, in, kernel ...] and ``second`` [2, out, r / 2]."""

    def __init__(self, config: Config, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        place, weight = masters(layer), layer.weight
        assert isinstance(weight, Tensor)
        self.strength = 1.0 if config.alpha is None else config.alpha / config.rank
        self.dropout, self.rank, self.embedding = 0.0, config.rank, False
        self.groups, half = int(getattr(layer, "groups", 1)), config.rank // 2
        bound = 1 / math.sqrt(fan_in(layer))
        first = torch.empty(self.groups, half, *weight.shape[1:], **place).uniform_(-bound, bound)
        second = nn.init.trunc_normal_(torch.empty(weight.shape[0], half, **place), std=1e-3, a=-2e-3, b=2e-3)
        self.first = Quantised(torch.stack([first, first]), config.bits, config.loss)
        self.second = Quantised(torch.stack([second, -second]), config.bits, config.loss)

    @property
    def down(self) -> Tensor:  # type: ignore[override]
        """``[A1 + A2, A1 - A2]`` of each group, [groups r, in, kernel ...]."""
        a, b = self.first.value()
        return torch.cat([a + b, a - b], 1).flatten(0, 1)

    @property
    def up(self) -> Tensor:  # type: ignore[override]
        """``[B1 + B2, B1 - B2] / 2``, [out, r]."""
        a, b = self.second.value()
        return torch.cat([a + b, a - b], 1) / 2

    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.first.latent, "up": self.second.latent}

    def packed(self) -> dict[str, Tensor]:
        (down, of_down), (up, of_up) = self.first.packed(), self.second.packed()
        return {"down": down, "down_statistics": of_down, "up": up, "up_statistics": of_up}

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        self.first.unpack(packed["down"], packed["down_statistics"])
        self.second.unpack(packed["up"], packed["up_statistics"])
