"""Autoguidance: away from a weaker version of the model itself, weak + w (c - weak).

Karras et al., 2024, arXiv 2406.02507. Beside a negative side it adds (w - 1) (c - weak). The weaker version is the
model without its adapters, with less of them, or with those of an earlier checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from visiontune.adapters import attached
from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.guidance.base import Perturbed, Strength
from visiontune.schema import nearest, option


@dataclass(frozen=True, kw_only=True)
class Config(Perturbed):
    """Another strength of the adapters, in one more call."""

    NEUTRAL: ClassVar[float] = 1.0

    scale: float = option(2.0, least=-1000, greatest=1000, help="w of weak + w (c - weak); 1 is none and costs nothing")
    strength: float = option(
        0.0, least=-100, greatest=100, help="of the adapters in the weaker version, times their own; 0 is without them"
    )
    weak: str | None = option(
        None,
        help="name of an attached set that alone acts in the weaker version, with `strength` 1, and nowhere else: "
        "visiontune.adapters.load(..., name='weak') of an earlier checkpoint, then its enabled set to false",
    )

    def difference(self, c: Tensor, worse: Tensor, s: Strength) -> Tensor:
        return (s - 1) * (c - worse)

    def worse(self, network: Network, arguments: Mapping[str, Any]) -> AbstractContextManager[Any]:
        return self._alone(network) if self.weak is not None else self._weakened(network)

    def check(self, network: Network) -> None:
        sets = attached(network.denoisers)
        if self.weak is not None and self.weak not in sets:
            raise UserError(f"autoguidance: no adapters called '{self.weak}' are attached{nearest(self.weak, sets)}")
        if self.weak is not None and sets[self.weak].enabled:
            raise UserError(
                f"autoguidance: '{self.weak}' acts in the model that is guided, too: set its enabled to false before"
            )
        if self.weak is None and (self.strength == 1 or not any(one.enabled for one in sets.values())):
            raise UserError(
                f"autoguidance: the weaker version of '{network.source}' would be the model itself: attach adapters, "
                "and take a strength other than 1"
            )

    @contextmanager
    def _weakened(self, network: Network) -> Iterator[None]:
        sets = [one for one in attached(network.denoisers).values() if one.enabled]
        with ExitStack() as stack:
            for one in sets:
                if self.strength == 0:
                    stack.enter_context(one.disable())
                else:
                    stack.callback(setattr, one, "scale", one.scale)
                    one.scale = one.scale * self.strength
            yield

    @contextmanager
    def _alone(self, network: Network) -> Iterator[None]:
        sets = attached(network.denoisers)
        with ExitStack() as stack:
            for name, one in sets.items():
                if name != self.weak:
                    stack.enter_context(one.disable())
            stack.callback(setattr, sets[str(self.weak)], "enabled", False)
            sets[str(self.weak)].enabled = True
            yield


def build(config: Config) -> Config:
    """The term."""
    return config
