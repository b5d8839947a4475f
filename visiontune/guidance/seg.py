"""SEG: away from what the network predicts when the parts of the picture look around with blurred queries.

Hong, 2024, arXiv 2408.00760: p + s (c - worse), where in the chosen layers the queries of the picture's tokens are
blurred over its grid by a Gaussian of deviation sigma, in tokens; a deviation without end gives all the mean query. At
the edges the weights are those of the tokens that there are, divided by their sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from visiontune.guidance._features import grid_of
from visiontune.guidance._network import Network
from visiontune.guidance._taps import Attention, attending
from visiontune.guidance.base import Perturbed
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Perturbed):
    """Blurred attention, in one more call."""

    scale: float = option(3.0, least=-1000, greatest=1000, help="s of p + s (c - worse)")
    sigma: float | None = option(
        None, above=0, greatest=1e6, help="deviation of the blur in tokens; null for the mean query"
    )
    layers: str | list[str] = option(
        "mid", help="mid, all, numbers of blocks, or patterns of the names of attention layers (down_blocks.*)"
    )

    def worse(self, network: Network, arguments: Mapping[str, Any]) -> AbstractContextManager[Any]:
        def attend(name: str) -> Attention:
            def blurred(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **call: Any) -> Tensor:
                words = network.words(name, arguments)
                seen = self._queries(q, words, network.grid(arguments))
                return scaled_dot_product_attention(seen, k, v, attn_mask=mask, **call)

            return blurred

        return attending(network.attention(self.layers, "seg"), "seg", attend)

    def check(self, network: Network) -> None:
        network.attention(self.layers, "seg")

    def _queries(self, q: Tensor, words: slice, ratio: tuple[int, int]) -> Tensor:
        """Queries [b, h, n, d] of which those of the picture's tokens are blurred."""
        first, last, _ = words.indices(q.shape[-2])
        before, told, after = q[..., :first, :], q[..., first:last, :], q[..., last:, :]
        picture = torch.cat([before, after], dim=-2)
        mend = "set its sigma to null"
        grid = None if self.sigma is None else grid_of(picture.shape[-2], ratio, self.name, mend)
        picture = blur(picture, self.sigma, grid)
        # Words stand before the picture or after it.
        return torch.cat([told, picture] if first == 0 else [picture, told], dim=-2)


def blur(x: Tensor, sigma: float | None, grid: tuple[int, int] | None) -> Tensor:
    """Tokens [b, heads, n, d] of a grid, blurred over it; their mean where `sigma` is None."""
    if sigma is None or grid is None:
        return x.mean(-2, keepdim=True).expand_as(x)
    rows, columns = (_weights(side, sigma, x) for side in grid)
    return torch.einsum("rh, cw, nbhwd -> nbrcd", rows, columns, x.unflatten(-2, grid)).flatten(-3, -2)


def _weights(side: int, sigma: float, like: Tensor) -> Tensor:
    """[side, side] of each token along an axis in what becomes of each."""
    place = torch.arange(side, dtype=torch.float32, device=like.device)
    return (-((place[:, None] - place) / sigma).square() / 2).softmax(1).to(like.dtype)


def build(config: Config) -> Config:
    """The term."""
    return config
