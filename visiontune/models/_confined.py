"""Attention to words that acts where a network paints, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d


def confined(network: nn.Module, layers: Sequence[nn.Module], channel: int) -> Callable[[], None]:
    """Have what the layers give be 0 outside of the mask that the network is shown; gives a function that undoes it.

    Args:
        network: called with latents and what stands beside them, [b, k, h, w], first or as `sample`.
        layers: each gives [b, n, d], a value for each place of a grid that divides h and w.
        channel: of the mask, 1 where the network paints. A place of a coarser grid counts wherever it has some of it.
    """
    shown: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        shown["mask"] = sample[:, channel : channel + 1].detach()

    def cut(module: nn.Module, args: tuple[Any, ...], given: Tensor) -> Tensor:
        mask = shown["mask"]
        factor = round(math.sqrt(mask[0].numel() / given.shape[1]))
        grid = tuple(-(-side // factor) for side in mask.shape[2:])
        return given * adaptive_max_pool2d(mask, grid).flatten(2).mT.to(given)

    handles = [network.register_forward_pre_hook(note, with_kwargs=True)]
    handles += [layer.register_forward_hook(cut) for layer in layers]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
