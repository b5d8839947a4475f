"""What a method has to define."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from visiontune.adapters._layers import Beneath

if TYPE_CHECKING:
    from visiontune.adapters._evidence import Evidence


_follows = ContextVar("follows", default=False)


@contextmanager
def start_follows() -> Iterator[None]:
    """Inside the block sets are made that a file or :meth:`Method.prepare` gives their start."""
    token = _follows.set(True)
    try:
        yield
    finally:
        _follows.reset(token)


def must_start() -> bool:
    """Whether a method with ``plans`` has to compute the start that it has without evidence, which may be costly."""
    return not _follows.get()


class Adapter(ABC):
    """One layer's share of a method."""

    @abstractmethod
    def weight(self, w: Tensor, scale: float) -> Tensor:
        """The definition of the method: the adapted weight of the layer, in the shape and dtype of ``w``.

        ``scale`` 1 is the full effect and 0 gives ``w`` back.
        """

    def bias(self, b: Tensor | None, scale: float) -> Tensor | None:
        """The adapted bias, likewise; methods that leave biases alone, as most do, return ``b`` itself."""
        return b

    @abstractmethod
    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """The layer's output for its input ``x``, as if ``beneath.weight()`` went through :meth:`weight`."""

    def low_rank(self, scale: float) -> tuple[Tensor, Tensor] | None:
        """``down`` [r, in, kernel ...] and ``up`` [out, r] where the change of the weight is just ``up @ down``."""
        return None

    @property
    def random(self) -> bool:
        """Whether a forward pass in training differs by chance from what :meth:`weight` gives, as with dropout."""
        return bool(getattr(self, "dropout", 0.0))

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is saved, by name; the tensors share memory with the parameters, so copying into them loads."""

    def packed(self) -> dict[str, Tensor] | None:
        """What is saved instead of :meth:`tensors` where a file has another form than the parameters.

        The tensors are copies of known shapes and dtypes. Values that :meth:`unpack` has taken on give the same ones.
        """
        return None

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        """Take on what :meth:`packed` gave; the layer's output is then the same bit for bit."""
        raise NotImplementedError


class Method(nn.Module):
    """The adapters of one component, by layer name, and the owner of their parameters.

    A method with ``plans`` looks at the task before training; its ``Config`` has an option ``batches``, the number of
    losses that it wants to see.
    """

    plans = False

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.adapters = dict(adapters)
        self.own = nn.ModuleList(a for a in self.adapters.values() if isinstance(a, nn.Module))

    def prepare(self, evidence: Evidence) -> None:
        """Called once before training, for methods with ``plans``: choose ranks, entries or starting values.

        What is chosen must be found in :meth:`Adapter.tensors`, and :meth:`fit` must take on its shapes.
        """

    def watch(self, root: nn.Module) -> Sequence[RemovableHandle]:
        """Called once the adapters are on the layers of the component ``root``: the place for hooks on the whole.

        The hooks are removed when the set is detached. They should be bound methods of what the adapters share, which
        a deep copy of the model then has its own of.
        """
        return ()

    def before_step(self, step: int = 0, loss_scale: float = 1.0) -> None:
        """Called when the gradients of an optimiser step are complete: the place to change them.

        Args:
            step: number of the step, the seed of whatever is drawn.
            loss_scale: what the loss, and so every gradient, is multiplied by (fp16 training).
        """

    def after_step(self, done: float = 0.0, optimizer: Optimizer | None = None) -> None:
        """Called after each optimiser step: the place for projections of the parameters.

        Args:
            done: share of the run's steps that are done, in (0, 1].
            optimizer: its state of a parameter is to be dropped where the parameter starts anew.
        """

    def fit(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Called before saved tensors (layer -> name -> tensor) are copied into :meth:`Adapter.tensors`.

        For methods whose shapes depend on more than the config: theirs must become the saved ones.
        """

    def refresh(self) -> None:
        """Forget what was computed from the parameters."""

    def train(self, mode: bool = True) -> Method:
        # Averaged weights are commonly swapped in through `.data`, which leaves no trace to notice; a change between
        # training and evaluation is when that happens.
        self.refresh()
        return super().train(mode)
