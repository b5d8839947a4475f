"""Which token a place of the picture is about, and attention that is moved that way; pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def on_grid(masks: Tensor, tokens: int) -> Tensor:
    """Masks [r, h, w] on the grid of a layer, bool [r, tokens]: halved, upwards rounded, as often as needed.

    Raises:
        ValueError: there is no such grid.
    """
    height, width = masks.shape[-2:]
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        raise ValueError(f"{tokens} tokens are no halving of a grid of {tuple(masks.shape[-2:])}")
    return F.interpolate(masks[None].float(), size=(height, width), mode="nearest-exact")[0].flatten(1) > 0.5


def about(regions: Tensor, columns: Sequence[Sequence[int]], length: int) -> Tensor:
    """bool [n, length]: whether a place [n] lies in a region, bool [r, n], whose tokens have this column."""
    found = regions.new_zeros(regions.shape[1], length)
    for region, at in zip(regions, columns, strict=True):
        found[:, list(at)] |= region[:, None]
    return found


def apart(inside: Tensor, columns: Sequence[Sequence[int]]) -> Tensor:
    """bool [n, m]: what a place is not about; a place of no region is just not about the regions' columns."""
    named = torch.zeros(inside.shape[1], dtype=torch.bool, device=inside.device)
    named[[at for several in columns for at in several]] = True
    return ~inside & (inside.any(1, keepdim=True) | named)


def alike(regions: Tensor) -> Tensor:
    """bool [n, n]: whether two places share a region; those of none share that."""
    whole = torch.cat([regions, ~regions.any(0, keepdim=True)]).float()
    return whole.T @ whole > 0


def pushed(logits: Tensor, inside: Tensor, outside: Tensor | None, share: Tensor) -> Tensor:
    """What logits [b, heads, n, m] get more, so that they go a share of the way to their row's greatest where they are
    inside, bool [b, 1, n, m], and to its least where outside."""
    up = (logits.amax(-1, keepdim=True) - logits) * inside
    down = 0 if outside is None else (logits - logits.amin(-1, keepdim=True)) * outside
    return share * (up - down)


def prominent(values: Tensor, words: slice, nouns: Tensor, top: int) -> Tensor:
    """bool [heads, n, d]: where a channel stands out in a place, since one of the `top` words that have the greatest
    |value| in it is a noun whose region the place lies in.

    Args:
        values: [heads, m, d] of the tokens. words: those of them that count. nouns: bool [n, m], as of `about`.
    """
    counted = values[:, words].abs()
    found = counted.topk(min(top, counted.shape[1]), dim=1).indices + words.start
    # [heads, top, d, n]
    return nouns.T[found].any(1).transpose(1, 2)
