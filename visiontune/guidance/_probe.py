"""Where in the picture each word is attended to: maps of chosen layers, recomputed beside the fused kernel.

Only the layers that are looked at pay for it, and every head by itself, so that one map of all tokens is held at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from visiontune.guidance._features import grid_of, pictured
from visiontune.guidance._network import Network
from visiontune.guidance._taps import Attention, attending

# (name of the layer, its map [rows, (heads), h, w, words])
Told = Callable[[str, Tensor], None]
# (q, k, mask, words, scale) -> what picture and words attend to each other, as `word_maps` has it.
Read = Callable[[Tensor, Tensor, Tensor | None, slice | None, float | None], Tensor]


def probing(
    network: Network,
    layers: Mapping[str, nn.Module],
    arguments: Mapping[str, Any],
    term: str,
    tell: Told,
    read: Read | None = None,
) -> AbstractContextManager[Callable[[], None]]:
    """In the block, each layer's map of words is told when it is called, with its graph where gradients are taken.

    Args:
        layers: of `Network.worded`. arguments: of the denoiser's call, filled in when it is made.
        term: who looks, for messages. read: makes the maps, `word_maps` unless another is given.

    Returns:
        A context whose value is a check for after the call, which raises UserError where a layer was not seen.
    """

    joint = network.structure is not None and network.structure.cross is None

    def attend(name: str) -> Attention:
        def seen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **call: Any) -> Tensor:
            words = network.words(name, arguments) if joint else None
            found = (read or word_maps)(q, k, mask, words, call.get("scale"))
            grid = grid_of(found.shape[-2], network.grid(arguments), term, "draw in another size")
            tell(name, found.unflatten(-2, grid))
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, **call)

        return seen

    return attending(layers, term, attend)


def word_maps(q: Tensor, k: Tensor, mask: Tensor | None, words: slice | None, scale: float | None = None) -> Tensor:
    """How much picture and words attend to each other, [b, n, words] float32 or more, mean over heads.

    Args:
        q, k: [b, heads, n, d] of a layer. mask, scale: as of scaled_dot_product_attention.
        words: which of the tokens are words, in joint attention, where the map is the mean of what the picture gives to
            words and words give to the picture; None where all keys are words and all queries the picture's.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    total = q.new_zeros((), dtype=dtype)
    for head in range(q.shape[1]):
        logits = factor * q[:, head].to(dtype) @ k[:, head].to(dtype).mT
        if mask is not None:
            logits = _masked(logits, mask[:, min(head, mask.shape[1] - 1)] if mask.ndim == 4 else mask)
        total = total + _between(logits.softmax(-1), words)
    return total / q.shape[1]


def shares_of_words(q: Tensor, k: Tensor, mask: Tensor | None, words: slice | None, scale: float | None) -> Tensor:
    """How each place of the picture shares its attention out among the words, [b, heads, n, words], sums 1.

    Args: as of :func:`word_maps`; in joint attention what the picture gives to itself is left out of the shares.
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        logits = (q.shape[-1] ** -0.5 if scale is None else scale) * q.to(dtype) @ k.to(dtype).mT
        logits = logits if mask is None else _masked(logits, mask)
        if words is not None:
            logits = logits[:, :, pictured(words, logits.shape[-1]), words]
        return logits.softmax(-1)


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask


def _between(shares: Tensor, words: slice | None) -> Tensor:
    """Of a map [b, n, n] of all tokens what is between the picture's and the words."""
    if words is None:
        return shares
    picture = pictured(words, shares.shape[-1])
    return (shares[:, picture, words] + shares[:, words, picture].mT) / 2


def of_places(found: Tensor, places: Sequence[Sequence[int]]) -> Tensor:
    """Maps [b, h, w] of some words of each row, the mean over these, of maps [b, h, w, words]."""
    return torch.stack([row[..., list(at)].mean(-1) for row, at in zip(found, places, strict=True)])


def together(maps: Sequence[Tensor]) -> Tensor:
    """The mean of layers' maps [b, h, w], on the finest of their grids."""
    finest = max((one.shape[-2:] for one in maps), key=lambda grid: grid[0] * grid[1])
    return torch.stack([F.interpolate(one[:, None], size=finest, mode="nearest-exact")[:, 0] for one in maps]).mean(0)
