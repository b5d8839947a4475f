"""APET: training in place of entries, or of layers, that are chosen by chance.

Su et al., "Exploring the Impact of Model Scaling on Parameter-Efficient Tuning", EMNLP 2023, arXiv 2306.02320.

    P = P_0 + scatter(delta at M),   M drawn at random, |M| = ceil(budget x entries)

Every set M of that size is as likely as any other, over all weights and biases of a component. With ``unit: layers``
whole layers are drawn one after another, and of the last one as many entries as are still lacking. M follows the
random state of the CPU when the set is attached, so that of a run follows its seed, and files hold M itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS, NORMS
from visiontune.adapters._sparse import Entries, InPlace
from visiontune.adapters.base import Method
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, nn.Embedding, *NORMS)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of APET; budget x entries parameters, rounded up."""

    budget: float = option(0.05, above=0, greatest=1, help="share of each component's entries to train; in (0, 1]")
    unit: Literal["entries", "layers"] = option("entries", help="draw single entries, or layer after layer")
    biases: bool = option(True, help="choose among biases too")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """APET for the layers of one component."""
    sizes = {name: _sizes(config, layer) for name, layer in layers.items()}
    count = math.ceil(config.budget * sum(map(sum, sizes.values())) - 1e-6)
    masks = (by_entries if config.unit == "entries" else by_layers)(
        [sum(size) for size in sizes.values()], max(1, count)
    )
    return InPlace(
        {
            name: Entries(layers[name], *(part.nonzero().squeeze(1) for part in mask.split(sizes[name])))
            for name, mask in zip(sizes, masks, strict=True)
        }
    )


def _sizes(config: Config, layer: Any) -> list[int]:
    """Entries of the weight and of the bias."""
    bias = getattr(layer, "bias", None)
    return [layer.weight.numel(), 0 if bias is None or not config.biases else bias.numel()]


def by_entries(sizes: Sequence[int], count: int) -> Sequence[Tensor]:
    """A mask [size] for each of ``sizes``, with ``count`` entries chosen in all of them together."""
    return drawn(sum(sizes), count).split(list(sizes))


def by_layers(sizes: Sequence[int], count: int) -> Sequence[Tensor]:
    """Likewise, but all masks are full or empty, except the one of the last layer drawn."""
    counts = [0] * len(sizes)
    for layer in torch.randperm(len(sizes)).tolist():
        counts[layer] = min(sizes[layer], count)
        count -= counts[layer]
    return [drawn(size, part) for size, part in zip(sizes, counts, strict=True)]


def drawn(size: int, count: int) -> Tensor:
    """A mask [size] with ``count`` entries set, every such mask as likely as any other."""
    few = min(count, size - count)
    mask = torch.zeros(size, dtype=torch.bool)
    # What is hit twice is drawn again; a permutation would take eight times the memory of the weights' entries.
    while lacking := few - int(mask.sum()):
        mask[torch.randint(size, (lacking,))] = True
    return mask if few == count else ~mask
