"""PAG: away from what the network predicts when the parts of the picture do not see each other.

Ahn et al., 2024, arXiv 2403.17377: p + s (c - worse), where in the chosen layers every token of the picture gets its
own value instead of what it would gather from the others. Where words stand among the tokens, the picture still attends
to them and they to everything, so that only the map from picture to picture is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from visiontune.guidance._network import Network
from visiontune.guidance._taps import Attention, attending
from visiontune.guidance.base import Perturbed
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Perturbed):
    """Perturbed attention, in one more call."""

    scale: float = option(3.0, least=-1000, greatest=1000, help="s of p + s (c - worse)")
    layers: str | list[str] = option(
        "mid", help="mid, all, numbers of blocks, or patterns of the names of attention layers (down_blocks.*)"
    )

    def worse(self, network: Network, arguments: Mapping[str, Any]) -> AbstractContextManager[Any]:
        def attend(name: str) -> Attention:
            return lambda q, k, v, mask, **call: identity(q, k, v, mask, network.words(name, arguments), **call)

        return attending(network.attention(self.layers, "pag"), "pag", attend)

    def check(self, network: Network) -> None:
        network.attention(self.layers, "pag")


def identity(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, words: slice, **call: Any) -> Tensor:
    """Attention [b, h, n, d] whose map from picture to picture is the identity.

    Args:
        q, k, v: [b, h, n, d]; fewer heads of k and v where queries share them. mask: as of
            scaled_dot_product_attention.
        words: which of the n tokens are words.
    """
    length = q.shape[-2]
    if words == slice(0, 0):
        return v if v.shape[1] == q.shape[1] else v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    is_word = torch.zeros(length, dtype=torch.bool, device=q.device)
    is_word[words] = True
    seen = is_word[:, None] | is_word[None] | torch.eye(length, dtype=torch.bool, device=q.device)
    if mask is not None:
        seen = seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, **call)


def build(config: Config) -> Config:
    """The term."""
    return config
