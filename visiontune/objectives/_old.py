"""The old policy: a second set of values of what is trained, which follows it at a distance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from visiontune.objectives.base import Tools


@torch.no_grad()
def follow(tools: Tools, decay: float) -> None:
    """``old <- decay old + (1 - decay) trained``, kept in ``tools.state``; the first time, a copy."""
    held: Mapping[str, Tensor] = tools.state.get("old", {})
    if not held:
        tools.state["old"] = {name: p.detach().clone() for name, p in tools.parameters.items()}
        return
    # A checkpoint gives it back on the CPU.
    tools.state["old"] = {name: held[name].to(p.device).lerp(p, 1 - decay) for name, p in tools.parameters.items()}


@contextmanager
def old_policy(tools: Tools) -> Iterator[None]:
    """Inside the block, which must build no graph, the model is the old policy."""
    own = {name: p.data for name, p in tools.parameters.items()}
    try:
        _put(tools, tools.state["old"])
        with torch.no_grad():
            yield
    finally:
        _put(tools, own)


def _put(tools: Tools, values: Mapping[str, Tensor]) -> None:
    for name, parameter in tools.parameters.items():
        parameter.data = values[name]
    tools.refresh()
