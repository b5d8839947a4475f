"""The time that a network is told, kept from being rounded on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def exact_time(time_proj: nn.Module, t: Tensor) -> Iterator[None]:
    """In the block, the first call of a network's `time_proj` gets `t`.

    Networks that take t in [0, 1] round it to the type of their latents before they multiply it by 1000: in bfloat16
    all from 873.5 to 876.5 is then 876, and all from 998.5 on is pure noise. The sines and cosines that `time_proj`
    makes of it bear rounding.

    Args:
        t: [b] float32, as the network would have it without rounding.
    """

    def first(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        handle.remove()  # further calls are of the guidance
        return (t, *args[1:])

    handle = time_proj.register_forward_pre_hook(first)
    try:
        yield
    finally:
        handle.remove()
