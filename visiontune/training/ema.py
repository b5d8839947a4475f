"""Moving average of the trained parameters, and a way to look through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch.nn import Parameter


class Average:
    """``average <- d average + (1 - d) weight`` after each step; ``d = min(decay, (1 + n) / (10 + n))`` early on.

    With ``decay=None`` it is inert: the average is the weights themselves.
    """

    def __init__(self, parameters: Sequence[Parameter], decay: float | None) -> None:
        self.parameters, self.decay = parameters, decay
        self.model = None if decay is None else EMAModel(parameters, decay=decay, foreach=True)

    def update(self) -> None:
        """Take the parameters as they are after one optimiser step into the average."""
        if self.model:
            self.model.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters hold the average; afterwards what they held before, bit for bit."""
        if not self.model:
            yield
            return
        self.model.store(self.parameters)
        self.model.copy_to(self.parameters)
        try:
            yield
        finally:
            self.model.restore(self.parameters)

    def state_dict(self) -> dict | None:
        return self.model.state_dict() if self.model else None

    def load_state_dict(self, state: dict | None) -> None:
        """Take up a saved average, at the decay asked for now; one that starts only now begins at the weights."""
        if self.decay is not None:
            self.model = EMAModel(self.parameters, decay=self.decay, foreach=True)
            self.model.load_state_dict({**state, "decay": self.decay} if state else {})
            self.model.to(self.parameters[0].device)
