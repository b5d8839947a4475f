"""Words that get a meaning of their own: rows of a text encoder's embedding, trained beside the adapters of a set.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion", 2022, arXiv
2208.01618, learn such a word alone. Prompts without the word read what they read before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from visiontune.adapters._layers import masters
from visiontune.adapters._method import Adapter

if TYPE_CHECKING:
    from visiontune.adapters._layers import Beneath

# Name of an embedding, with its component's -> the embedding, the words' rows of it, and rows that stay as they are.
Places = Mapping[str, tuple[nn.Embedding, Mapping[str, Sequence[int]], Collection[int]]]


class Words(nn.Module, Adapter):
    """What is added to some rows of an embedding, ``[n, d]``.

    Args:
        layer: the embedding.
        words: word -> its rows, in the order in which they are read; words may share rows.
        known: rows that stay as they are.
    """

    def __init__(self, layer: nn.Embedding, words: Mapping[str, Sequence[int]], known: Collection[int] = ()) -> None:
        super().__init__()
        self.words = {word: list(ids) for word, ids in words.items()}
        self.ids = sorted({i for ids in self.words.values() for i in ids})
        self.trained = [n for n, i in enumerate(self.ids) if i not in known]
        self.rows = nn.Parameter(torch.zeros(len(self.ids), layer.embedding_dim, **masters(layer)))

    def weight(self, w: Tensor, scale: float) -> Tensor:
        return w.index_add(0, torch.tensor(self.ids, device=w.device), (scale * self.rows).to(w.dtype))

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        out = beneath(x)
        # A product with a choice: looked up rows would be written back one by one, in an order that threads decide.
        chosen = torch.stack([x == self.ids[n] for n in self.trained], -1).to(self.rows.dtype)
        return out + (scale * (chosen @ self.rows[self.trained])).to(out.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows}
