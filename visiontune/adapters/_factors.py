"""Changes of a weight between two frozen factors: W' = W + L diag(t) R with only ``t`` trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.adapters._layers import masters, pointwise, run
from visiontune.adapters._low_rank import matrices
from visiontune.adapters.base import Adapter, Beneath

# W [out, d] in high precision -> L [out, r], R [r, d]
Factorise = Callable[[Tensor], tuple[Tensor, Tensor]]


class Diagonal(nn.Module, Adapter):
    """``t`` [groups, r], zero at the start, between the factors of one layer.

    The factors follow from the base weight, so they are neither trained nor saved. Every group of a convolution has its
    own. The change is added, rather than the rest subtracted from the base, so the start is the base bit for bit.

    Args:
        layer: a linear layer or a convolution. factorise: its weight, group by group, flattened to [out, in x kernel].
    """

    left: Tensor
    right: Tensor

    def __init__(self, layer: Any, factorise: Factorise) -> None:
        super().__init__()
        self.groups, weight = int(getattr(layer, "groups", 1)), layer.weight.detach()
        pairs = [factorise(part) for part in matrices(layer, weight)]
        rank = max(left.shape[1] for left, _ in pairs)
        lefts = [F.pad(left, (0, rank - left.shape[1])) for left, _ in pairs]
        rights = [F.pad(right, (0, 0, 0, rank - right.shape[0])) for _, right in pairs]
        place = masters(layer)
        self.register_buffer("left", torch.cat(lefts).to(**place), persistent=False)
        right = torch.cat(rights).reshape(self.groups * rank, *weight.shape[1:])
        self.register_buffer("right", right.to(**place), persistent=False)
        self.t = nn.Parameter(torch.zeros(self.groups, rank, **place))

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``w + scale L diag(t) R``, group by group."""
        left = self.left.view(self.groups, -1, self.t.shape[1]) * self.t[:, None]
        change = (left @ self.right.reshape(self.groups, self.t.shape[1], -1)).reshape(w.shape)
        return w + (scale * change).to(w.dtype)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """``layer(x) + scale L (t * R x)``; no product of the factors is formed."""
        layer, y = beneath.layer, beneath(x)
        x, left, right, t = (v.to(y.dtype) for v in (x, self.left, self.right, self.t.flatten()))
        low = run(layer, x, right, None) * t.view(-1, *[1] * (right.dim() - 2))
        return torch.add(y, pointwise(layer, low, left), alpha=scale)

    def tensors(self) -> dict[str, Tensor]:
        return {"t": self.t}
