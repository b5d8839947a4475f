"""The old policy: a second set of values of what is trained, which follows it at a distance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from visiontune.objectives.base import Tools
from visiontune.ops.shards import is_sharded


@torch.no_grad()
def follow(tools: Tools, decay: float) -> None:
    """``old <- decay old + (1 - decay) trained``, kept in ``tools.state``; the first time, a copy."""
    held: Mapping[str, Tensor] = tools.state.get("old", {})
    if not held:
        tools.state["old"] = {name: p.detach().clone() for name, p in tools.parameters.items()}
        return
    # A checkpoint gives it back on the CPU.
    tools.state["old"] = {name: held[name].to(p.device).lerp(p, 1 - decay) for name, p in tools.parameters.items()}


def old_policy(tools: Tools) -> AbstractContextManager[None]:
    """Inside the block, which must build no graph, the model is the old policy."""
    return swapped(tools.parameters, tools.state["old"], tools.refresh)


@contextmanager
def swapped(
    parameters: Mapping[str, Parameter], values: Mapping[str, Tensor], refresh: Callable[[], None]
) -> Iterator[None]:
    """Inside the block, which must build no graph, parameters have other values; ``refresh`` follows every change."""
    # Whoever gathers a sharded weight keeps hold of its memory, so its values are written there.
    own = {name: p.detach().clone() if is_sharded(p) else p.data for name, p in parameters.items()}

    @torch.no_grad()
    def put(chosen: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            if is_sharded(parameter):
                parameter.copy_(chosen[name])
            else:
                parameter.data = chosen[name]
        # An autocast around the block keeps rounded weights, and knows them by the parameter.
        torch.clear_autocast_cache()
        refresh()

    try:
        put(values)
        with torch.no_grad():
            yield
    finally:
        put(own)
