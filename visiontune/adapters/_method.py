"""What a method has to define."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from visiontune.adapters._layers import Beneath


class Adapter(ABC):
    """One layer's share of a method."""

    @abstractmethod
    def weight(self, w: Tensor, scale: float) -> Tensor:
        """The definition of the method: the adapted weight of the layer, in the shape and dtype of ``w``.

        ``scale`` 1 is the full effect and 0 gives ``w`` back.
        """

    @abstractmethod
    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """The layer's output for its input ``x``, as if ``beneath.weight()`` went through :meth:`weight`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is saved, by name; the tensors share memory with the parameters, so copying into them loads."""


class Method(nn.Module):
    """The adapters of one component, by layer name, and the owner of their parameters."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.adapters = dict(adapters)
        self.own = nn.ModuleList(a for a in self.adapters.values() if isinstance(a, nn.Module))

    def after_step(self) -> None:
        """Called after each optimiser step: the place for projections of the parameters."""

    def refresh(self) -> None:
        """Forget what was computed from the parameters."""

    def train(self, mode: bool = True) -> Method:
        # Averaged weights are commonly swapped in through `.data`, which leaves no trace to notice; a change between
        # training and evaluation is when that happens.
        self.refresh()
        return super().train(mode)
