"""What a network says its blocks are."""

from __future__ import annotations

from torch import nn


def named(network: nn.Module) -> set[str]:
    """The classes of the blocks that diffusers or transformers keep on one device or that a network repeats."""
    own = [getattr(network, name, None) or () for name in ("_no_split_modules", "_repeated_blocks")]
    return {name for listed in own for name in listed}
