"""What the rows of one side attend to, in calls whose rows are the target's and the origin's in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from visiontune.errors import UserError
from visiontune.guidance._features import grid_of, pictured, put
from visiontune.guidance._network import Network
from visiontune.guidance._taps import Attention, attending, noted

_TERM = "freecompose"


@contextmanager
def dropping(network: Network, inside: np.ndarray, threshold: float) -> Iterator[None]:
    """In the block, the target's rows attend to no token of the picture that a mask [h, w] covers.

    Args:
        threshold: share of a token that is covered from which it counts so.
    """
    mask = torch.from_numpy(inside)[None, None]

    def attend(name: str, arguments: Mapping[str, Any]) -> Attention:
        def seen(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, **call: Any) -> Tensor:
            left = _left(mask, threshold, name, network, arguments, k.shape[-2]).to(k.device)
            whole = scaled_dot_product_attention(q, k, v, attn_mask=bias, **call)
            if len(left) == k.shape[-2]:
                return whole
            q, k, v = (one[::2] for one in (q, k[..., left, :], v[..., left, :]))
            bias = bias if bias is None else _rows(bias, len(whole))[::2][..., left]
            target = scaled_dot_product_attention(q, k, v, attn_mask=bias, **call)
            return torch.stack([target, whole[1::2]], 1).flatten(0, 1)

        return seen

    with _tapped(network, 0.0, attend):
        yield


@contextmanager
def sharing(network: Network, share: float) -> Iterator[None]:
    """In the block, the picture's tokens of the target's rows attend to the keys and values of the origin's.

    Args:
        share: of the layers, in order, from which on they do.
    """

    def attend(name: str, arguments: Mapping[str, Any]) -> Attention:
        def seen(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, **call: Any) -> Tensor:
            at = pictured(network.words(name, arguments), k.shape[-2])
            k, v = (put(one, one[1::2, :, at].repeat_interleave(2, 0), at) for one in (k, v))
            return scaled_dot_product_attention(q, k, v, attn_mask=bias, **call)

        return seen

    with _tapped(network, share, attend):
        yield


@contextmanager
def _tapped(network: Network, share: float, attend: Callable[[str, Mapping[str, Any]], Attention]) -> Iterator[None]:
    layers = [*network.attention("all", _TERM).items()]
    arguments: dict[str, Any] = {}
    chosen = dict(layers[int(share * len(layers)) :])
    with noted(network.denoiser, arguments), attending(chosen, _TERM, lambda name: attend(name, arguments)) as check:
        yield
    check()


def _left(
    mask: Tensor, threshold: float, name: str, network: Network, arguments: Mapping[str, Any], tokens: int
) -> Tensor:
    """Numbers of the tokens that are attended to."""
    at = pictured(network.words(name, arguments), tokens)
    count = at.stop - at.start
    grid = grid_of(count, network.grid(arguments), _TERM, "take a picture of another size")
    covered = (F.interpolate(mask, size=grid, mode="area") > threshold).flatten()
    if covered.all():
        raise UserError(
            f"freecompose: the mask leaves layer '{name}' nothing to attend to on its {grid[1]}x{grid[0]} tokens: take "
            "a smaller mask, or a higher threshold"
        )
    whole = torch.ones(tokens, dtype=torch.bool)
    whole[at] = ~covered
    return whole.nonzero().flatten()


def _rows(bias: Tensor, rows: int) -> Tensor:
    """A mask of attention with an axis of rows."""
    return bias.expand(rows, *bias.shape[-3:]) if bias.ndim == 4 else bias.expand(rows, 1, *bias.shape[-2:])
