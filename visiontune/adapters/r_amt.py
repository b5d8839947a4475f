"""R-AMT: a trained choice of which entries of the frozen weights to leave out.

Zheng et al., "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models", ICCV 2023,
arXiv 2307.15049.

    W' = m * W,    m = 1 where M > threshold, 0 elsewhere;    loss + norm sum_layers ||M||_2

The scores M start at one value above the threshold, so everything is kept. Their gradient takes the threshold for the
identity: dL/dM = dL/dW' * W. The paper's gradient dropout, which asks a second loss whether a score may move, is left
out.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from visiontune.adapters import _bits
from visiontune.adapters._layers import CONVOLUTIONS, masters
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of mask tuning; a trained score for each weight, and one bit of each in the file."""

    initial: float = option(1e-2, least=-1000, greatest=1000, help="the scores' first value")
    threshold: float = option(5e-3, least=-1000, greatest=1000, help="weights whose score is not above it are left out")
    norm: float = option(
        1e-4,
        least=0,
        greatest=1e6,
        help="weight of the scores' lengths in the loss, which draws them towards leaving out",
    )

    def __post_init__(self) -> None:
        if not self.initial > self.threshold:
            raise ValueError("initial must be above threshold, so that nothing is left out at first")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """Masks for the layers of one component."""
    return Masks(config, layers)


class Masks(Method):
    """The masks of one component."""

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        super().__init__({name: Mask(config, layer) for name, layer in layers.items()})
        self.norm = config.norm

    @torch.no_grad()
    def before_step(self, step: int = 0, loss_scale: float = 1.0) -> None:
        """Add the gradient of the scores' lengths, ``norm M / ||M||``."""
        for score in self.parameters():
            if score.grad is not None and self.norm:
                length = score.norm().clamp_min(torch.finfo(score.dtype).tiny)
                score.grad.add_(score / length, alpha=self.norm * loss_scale)

    @torch.no_grad()
    def after_step(self, done: float = 0.0, optimizer: Optimizer | None = None) -> None:
        """Say at the end of a run that it changed nothing, which the scores alone do not show."""
        masks = [a for a in self.adapters.values() if isinstance(a, Mask)]
        if done < 1 or not all(mask.kept().all() for mask in masks):
            return
        first, lowest = masks[0], min(float(mask.score.min()) for mask in masks)
        warnings.warn(
            f"r_amt leaves nothing out: no score fell from {first.initial:g} below {lowest:.2g}, and the threshold is "
            f"{first.threshold:g}; raise train.lr or train.steps",
            stacklevel=2,
        )


class Mask(nn.Module, Adapter):
    """``score`` of one layer's weight, of its shape."""

    def __init__(self, config: Config, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer.weight, Tensor)
        self.initial, self.threshold = config.initial, config.threshold
        self.score = nn.Parameter(torch.full(layer.weight.shape, config.initial, **masters(layer)))

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``m * w`` for scale 1; the entries that are left out keep ``1 - scale`` of themselves."""
        # The difference is zero, and passes the gradient by the threshold.
        mask = self.kept().to(self.score) + (self.score - self.score.detach())
        return w * (1 + scale * (mask - 1)).to(w.dtype)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """One product with the masked weight."""
        return beneath.using(x, self.weight(beneath.weight(), scale))

    def kept(self) -> Tensor:
        """m, as booleans."""
        return self.score.detach() > self.threshold

    def tensors(self) -> dict[str, Tensor]:
        return {"score": self.score}

    def packed(self) -> dict[str, Tensor]:
        return {"kept": _bits.pack(self.kept(), 1)}

    @torch.no_grad()
    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        """Scores of the first value where an entry is kept, and as far below the threshold where it is not."""
        kept = _bits.unpack(packed["kept"], 1, self.score.shape)
        self.score.copy_(torch.where(kept.bool(), self.initial, 2 * self.threshold - self.initial))
