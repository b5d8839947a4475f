"""Self-attention over the pictures of a set: each row of a network reads the tokens of all rows of its set.

Zeng et al., "JeDi: Joint-Image Diffusion Models for Finetuning-Free Personalized Text-to-Image Generation", 2024, arXiv
2407.06187: features [b n, l, d] are folded to [b, n l, d] around self-attention and unfolded after it; nothing else of
the network sees other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class Coupling:
    """Hooks on the layers of self-attention, which keep their own processors and kernels.

    Attributes:
        sizes: rows of each set, in their order; further rows are further sets of these sizes, as the two sides of
            guidance are. Sets of one row are not coupled. Blocks that are checkpointed are computed again by them, so
            they stay until the next call.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.sizes: tuple[int, ...] = (1,)
        self._handles = [layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in layers]
        self._handles += [layer.register_forward_hook(self._after) for layer in layers]

    def undo(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def of(self, sizes: Sequence[int]) -> Iterator[None]:
        """In the block, sets of these sizes."""
        before, self.sizes = self.sizes, tuple(sizes)
        try:
            yield
        finally:
            self.sizes = before

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if max(self.sizes) == 1:
            return None
        folded, mask = fold(args[0] if args else kwargs.pop("hidden_states"), self.sizes)
        return (folded, *args[1:]), {**kwargs, "attention_mask": mask}

    def _after(self, layer: nn.Module, args: tuple[Any, ...], given: Tensor) -> Tensor:
        return given if max(self.sizes) == 1 else unfold(given, self.sizes)


def fold(features: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Features [b, l, d] of rows as those of their sets [s, n l, d], n being the most rows of a set.

    Returns:
        The folded features, zero where a set has fewer rows, and what is added to the scores of attention [s, 1, n l]:
        0, or the least number there; None where all sets are as large.

    Raises:
        ValueError: the rows are no whole number of times the sets.
    """
    rows, tokens, width = features.shape
    if rows % sum(sizes):
        raise ValueError(f"{rows} rows are not some times sets of {', '.join(map(str, sizes))}")
    if len({*sizes}) == 1:
        return features.reshape(-1, sizes[0] * tokens, width), None
    places = _places(sizes, rows // sum(sizes)).to(features.device)
    most = max(sizes)
    padded = features.new_zeros(len(sizes) * rows // sum(sizes) * most, tokens, width).index_copy(0, places, features)
    absent = torch.ones(len(padded), 1, tokens, dtype=torch.bool, device=features.device)
    absent[places] = False
    mask = features.new_zeros(absent.shape).masked_fill(absent, torch.finfo(features.dtype).min)
    return padded.reshape(-1, most * tokens, width), mask.reshape(-1, 1, most * tokens)


def unfold(folded: Tensor, sizes: Sequence[int]) -> Tensor:
    """:func:`fold` undone: [s, n l, d] -> [b, l, d]."""
    sets, length, width = folded.shape
    rows = folded.reshape(sets * max(sizes), length // max(sizes), width)
    return rows if len({*sizes}) == 1 else rows[_places(sizes, sets // len(sizes)).to(folded.device)]


def _places(sizes: Sequence[int], times: int) -> Tensor:
    """Where each row of so many times the sets lies among the padded ones."""
    most = max(sizes)
    return torch.tensor([*chain.from_iterable(range(k * most, k * most + n) for k, n in enumerate([*sizes] * times))])
