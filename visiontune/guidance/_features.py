"""What attention layers are given while pictures are inverted, kept for the run that reads it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from visiontune.core import Condition
from visiontune.diffusion.guidance import Call, Guidance
from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.guidance._taps import Attention, attending, noted

# Of each layer q, k and v of the rows, [b, heads, n, d] of the picture's tokens.
Features = dict[str, tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept(Guidance):
    """No guidance, but what layers are given in its calls is kept, by level of noise.

    Attributes:
        term: that asks. network: of the calls. layers: of it, by name.
        rows: which of them are kept of q, and of k and v. offload: keep them in main memory.
    """

    term: str
    network: Network
    layers: Mapping[str, nn.Module]
    rows: tuple[slice, slice]
    offload: bool = False
    features: dict[float, Features] = field(default_factory=dict)

    def __call__(
        self, call: Call, x: Tensor, t: Tensor, level: Tensor, cond: Condition, uncond: Condition | None
    ) -> Tensor:
        arguments: dict[str, Any] = {}
        with noted(self.network.denoiser, arguments), self._kept(float(level[0]), arguments):
            return call(x, t, cond)

    def at(self, level: float) -> Features:
        """Those of the level that is nearest: networks that are told their time in other units have it rounded."""
        return self.features[min(self.features, key=lambda one: abs(one - level))]

    @contextmanager
    def _kept(self, level: float, arguments: Mapping[str, Any]) -> Iterator[None]:
        kept = self.features.setdefault(level, {})

        def attend(name: str) -> Attention:
            def seen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **call: Any) -> Tensor:
                at = pictured(self.network.words(name, arguments), q.shape[-2])
                of_q, of_k = self.rows
                kept[name] = (self._copy(q[of_q, :, at]), self._copy(k[of_k, :, at]), self._copy(v[of_k, :, at]))
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, **call)

            return seen

        with attending(self.layers, self.term, attend) as check:
            yield
        check()

    def _copy(self, x: Tensor) -> Tensor:
        # A part of a tensor would keep all of it.
        return x.to("cpu" if self.offload else x.device, copy=True)


def pictured(words: slice, tokens: int) -> slice:
    """Where the picture's tokens are, beside the words, which stand before or after them."""
    first, last, _ = words.indices(tokens)
    return slice(last, tokens) if first == 0 else slice(0, first)


def put(whole: Tensor, part: Tensor, at: slice) -> Tensor:
    """Tokens [b, heads, n, d] with others in their place."""
    return torch.cat([whole[..., : at.start, :], part, whole[..., at.stop :, :]], dim=-2)


def grid_of(tokens: int, ratio: tuple[int, int], term: str, mend: str) -> tuple[int, int]:
    """Height and width of a grid of so many tokens with sides in a ratio.

    Raises:
        UserError: there is none; `term` is who asks, `mend` what helps.
    """
    exact = math.sqrt(tokens * ratio[0] / ratio[1])
    for height in sorted({math.floor(exact), math.ceil(exact)} - {0}, key=lambda side: abs(side - exact)):
        if tokens % height == 0:
            return height, tokens // height
    raise UserError(f"{term} finds no grid of {tokens} tokens like {ratio[0]}x{ratio[1]}: {mend}")
