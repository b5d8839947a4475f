"""Regional compilation: the blocks that a denoiser repeats are compiled, each kind once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from visiontune.errors import UserError

BACKEND = "inductor"


def compile_blocks(networks: Mapping[str, nn.Module], source: str, backend: str | None = None) -> None:
    """Have the repeated blocks of some networks compiled where they are first called, with whatever is attached.

    Args:
        networks: by name. source: the model's, for errors. backend: of `torch.compile`; inductor unless given.

    Raises:
        UserError: diffusers names no repeated blocks of a network.
    """
    network: Any
    found = {name: _repeated(network) for name, network in networks.items()}
    for name, blocks in found.items():
        if not blocks:
            raise UserError(
                f"model.compile: diffusers names no repeated blocks of the {name} of '{source}' "
                f"({type(networks[name]).__name__}): set it to false"
            )
    for name, network in networks.items():
        network._repeated_blocks = found[name]
        network.compile_repeated_blocks(backend=backend or BACKEND)


def _repeated(network: Any) -> list[str]:
    """The classes of the blocks that a network repeats: where nobody says, those that must stay on one device."""
    named = getattr(network, "_repeated_blocks", None)
    return named or [name for name in getattr(network, "_no_split_modules", None) or [] if name.endswith("Block")]


def told() -> str:
    """A line on how many graphs torch has compiled in this process, and what it could not compile."""
    from torch._dynamo.utils import counters

    graphs, breaks = counters["stats"]["unique_graphs"], counters["graph_break"]
    if not breaks:
        return f"compiled: {graphs} graphs, each whole"
    why = next(iter(breaks)).strip().splitlines()[0]
    return f"compiled: {graphs} graphs, cut {sum(breaks.values())} times where they run uncompiled ({why})"
