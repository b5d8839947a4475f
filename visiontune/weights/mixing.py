"""Adapters of one base mixed by their changes: what a mean of two weights is, whatever the methods.

    W' = W + sum_k s_k D_k

with D_k what each makes of the base by itself. Shares 1 - l and l of two are the interpolation of weights by which
Cideron et al., 2024, arXiv 2410.06084, choose between the quality of one and the diversity of the other. Means of the
factors of two LoRAs are something else: their product has terms that belong to neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from visiontune.adapters import AdapterSet
from visiontune.weights._changes import Dense
from visiontune.weights.lora_files import attach_changes


@torch.no_grad()
def mixed(
    networks: Mapping[str, nn.Module], sets: Sequence[AdapterSet], shares: Sequence[float], name: str = "mixed"
) -> AdapterSet:
    """Attach the mixture, in evaluation mode.

    Args:
        networks: all of the model's, by name.
        sets: attached to them, not merged, each at its present strength. They go on acting: disable or detach them.
        shares: of each.
        name: see :func:`visiontune.adapters.attach`.
    """
    found: dict[str, Dense] = {}
    for one, share in zip(sets, shares, strict=True):
        for layer in one.base_layers():
            weight, bias = one.change(layer)
            before = found.get(layer, Dense(None))
            found[layer] = Dense(_added(before.weight, share, weight), _added(before.bias, share, bias))
    return attach_changes(found, networks, name)


def _added(total: torch.Tensor | None, share: float, more: torch.Tensor | None) -> torch.Tensor | None:
    if more is None:
        return total
    return share * more if total is None else total + share * more
