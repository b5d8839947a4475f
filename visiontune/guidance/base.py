"""What a term of a stack is. A prediction is

    p = base(c, u) + sum_k s_k (c - worse_k)

and then goes through the terms that control its norm, in the order in which they stand in the stack. c is the
prediction for the prompt, u the one for the negative prompt, and worse_k what a perturbed network predicts for the
prompt.

Every term has a strength by row, which depends on how noisy the row is. Where all rows have the strength at which a
term does nothing, it is not evaluated and costs no call.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from visiontune.diffusion.schedule import Schedule
from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.schema import option

Curve = Literal["constant", "linear", "cosine"]
# A strength that is one number, or one for each row, shaped to go with a prediction.
Strength = float | Tensor


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a prediction is made.

    Attributes:
        x: [b, ...] what the network sees, in the shape of its prediction. t: [b] timesteps of the schedule.
        levels: of noise of the rows, shares of the schedule. schedule: None where tokens are masked.
        memory: of one term, from step to step of a run.
    """

    x: Tensor
    t: Tensor
    levels: Sequence[float]
    schedule: Schedule | None
    memory: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One way to guide, with a strength that its `Config` has as `scale`.

    Attributes:
        NEUTRAL: the strength at which it does nothing.
        ROWS: how many more times the network sees every row where it acts.
    """

    SHORTHAND: ClassVar[str] = "scale"
    NEUTRAL: ClassVar[float] = 0.0
    ROWS: ClassVar[int] = 0

    scale: float = option(help="strength")
    window: tuple[float, float] = option(
        (0.0, 1.0), least=0, greatest=1, help="levels of noise, both included, between which it acts; 1 is pure noise"
    )
    schedule: Curve = option(
        "constant",
        help="its strength at a level of noise l, as a share of what it does: linear 2 (1 - l), cosine 1 + cos(pi l)",
    )

    def __post_init__(self) -> None:
        low, high = self.window
        if not low < high:
            raise UserError(f"window must be two levels of noise, the lower one first, not {low:g} and {high:g}")

    @property
    def name(self) -> str:
        """The file that it is in."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def remembers(self) -> bool:
        """Whether it reads what earlier steps left in the memory."""
        return False

    @property
    def idle(self) -> bool:
        """Whether it does nothing at any level."""
        return self.scale == self.NEUTRAL

    def at(self, level: float) -> float:
        """Its strength at a level of noise in [0, 1]."""
        low, high = self.window
        if self.idle or not low <= level <= high:
            return self.NEUTRAL
        if self.schedule == "constant":
            return self.scale
        share = 2 * (1 - level) if self.schedule == "linear" else 1 + math.cos(math.pi * level)
        return self.NEUTRAL + (self.scale - self.NEUTRAL) * share

    def acts(self, levels: Sequence[float]) -> bool:
        """Whether it does anything at any of the levels."""
        return any(self.at(level) != self.NEUTRAL for level in levels)

    def amount(self, levels: Sequence[float], like: Tensor) -> Strength:
        """Of rows at these levels, to multiply a prediction [b, ...] with."""
        found = [self.at(level) for level in levels]
        # One number leaves low precision what it is, as in the stock pipelines.
        return found[0] if len({*found}) == 1 else torch.tensor(found).to(like).view(-1, *(1,) * (like.ndim - 1))

    def check(self, network: Network) -> None:
        """Refuse a network that it cannot guide: UserError naming it and the mend."""


class Told(Term):
    """A term whose strength the network is told, as `extra["guidance"]` [b]; one at most in a stack."""

    NEUTRAL: ClassVar[float] = 1.0

    def telling(self, levels: Sequence[float], device: torch.device) -> Tensor:
        """[b] float32, what the network is told of rows at these levels."""
        return torch.tensor([self.at(level) for level in levels], dtype=torch.float32, device=device)


class Base(Term, ABC):
    """A term that makes one prediction of the two for the prompt and the negative prompt; one at most in a stack."""

    NEUTRAL: ClassVar[float] = 1.0
    ROWS: ClassVar[int] = 1

    @abstractmethod
    def combine(self, u: Tensor, c: Tensor, w: Strength, point: Point) -> Tensor:
        """The guided prediction [b, ...] of u and c; `w` 1 leaves c."""


class Perturbed(Term, ABC):
    """A term that guides away from what a worse network predicts for the same prompt."""

    ROWS: ClassVar[int] = 1

    @abstractmethod
    def worse(self, network: Network, arguments: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """In the block the network is worse.

        Args:
            arguments: of the call of the denoiser in the block, filled in when it is made.
        """

    def difference(self, c: Tensor, worse: Tensor, s: Strength) -> Tensor:
        """What it adds to the prediction."""
        return s * (c - worse)


class Control(Term, ABC):
    """A term that changes the prediction that the others have made."""

    @abstractmethod
    def control(self, p: Tensor, c: Tensor, phi: Strength) -> Tensor:
        """The prediction p [b, ...], changed in view of the prompt's c."""


def rows_of(x: Tensor) -> tuple[int, ...]:
    """The axes of a row: all but the batch."""
    return tuple(range(1, x.ndim))


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of rows, [b, 1, ...]."""
    return (x * y).sum(rows_of(x), keepdim=True)
