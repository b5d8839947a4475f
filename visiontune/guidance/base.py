"""What a term of a stack is. A prediction is

    p = base(c, u) + sum_k s_k (c - worse_k) + sum_j pull_j

and then goes through the terms that control its norm, in the order in which they stand in the stack. c is the
prediction for the prompt, u the one for the negative prompt, worse_k what a perturbed network predicts for the prompt,
and pull_j what a term finds by calls or gradients of its own. Where the canvas is made of regions all this is done for
each of them, and p is blended of what they give. Between the steps, terms edit the latents; and some shape the network
in all its calls, or add to what it is given in them.

Every term has a strength by row, which depends on how noisy the row is. Where all rows have the strength at which a
term does nothing, it is not evaluated and costs no call.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion.schedule import Schedule
from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.schema import option

Curve = Literal["constant", "linear", "cosine"]
# A strength that is one number, or one for each row, shaped to go with a prediction.
Strength = float | Tensor


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a sampler.

    Attributes:
        model: of a family; None on a stock pipeline that no model was made of.
        levels: of noise where the steps stand, in order; empty where they are not known.
        shape: [c, (f), h, w] of the latents; empty where it is not known.
        prompts: of the rows; None where they are not known, as in rollouts and where a user calls a pipeline.
    """

    model: Any = None
    levels: Sequence[float] = ()
    shape: Sequence[int] = ()
    prompts: Sequence[str] | None = None

    def after(self, level: float) -> float | None:
        """The level to which the step from a level leads, 0 at the end; None where no step stands there."""
        step = place(self.levels, level)
        return None if step is None else [*self.levels[1:], 0.0][step]

    def modelled(self, term: str) -> Any:
        """The model, which a term encodes pictures and prompts with.

        Raises:
            UserError: there is none.
        """
        if self.model is None:
            raise UserError(
                f"{term} encodes pictures or prompts of its own, for which a pipeline is not enough: attach the stack "
                "to a model, as visiontune.models.load gives it"
            )
        return self.model


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a prediction is made.

    Attributes:
        x: [b, ...] the latents, or masked tokens. t: [b] timesteps of the schedule.
        levels: of noise of the rows, shares of the schedule. schedule: None where tokens are masked.
        run: of which it is a point. memory: of one term, from step to step of the run.
        place: row and column of the canvas where the first of the latents lies, if they are those of a region.
    """

    x: Tensor
    t: Tensor
    levels: Sequence[float]
    schedule: Schedule | None
    run: Run = Run()
    memory: dict[str, Any] = field(default_factory=dict)
    place: tuple[int, int] = (0, 0)


class Sides(Protocol):
    """The calls of a network that a stack makes at one point, each of which sees every row once or twice."""

    def both(self) -> tuple[Tensor, Tensor]:
        """What is predicted for the negative prompt and for the prompt."""

    def prompt(self) -> Tensor:
        """What is predicted for the prompt alone."""

    def worse(self, term: Perturbed) -> Tensor:
        """What the network predicts for the prompt when a term has made it worse."""

    def at(self, x: Tensor, cond: Condition | None = None) -> Tensor:
        """What is predicted at other latents of the same times and for other conditions; None for the prompt."""

    def of(self, part: Part, point: Callable[[Term], Point]) -> Sides:
        """The calls for a region, in which terms are at points of their own."""

    def conditions(self) -> tuple[Condition, Condition | None]:
        """Of the rows: what they are for and what they are guided away from, as far as that is known."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One way to guide, with a strength that its `Config` has as `scale`.

    Attributes:
        NEUTRAL: the strength at which it does nothing.
        ROWS: how many more times the network sees every row where it acts.
        NEGATIVE: whether it needs what is predicted for the negative prompt.
    """

    SHORTHAND: ClassVar[str] = "scale"
    NEUTRAL: ClassVar[float] = 0.0
    ROWS: ClassVar[int] = 0
    NEGATIVE: ClassVar[bool] = False

    scale: float = option(help="strength")
    window: tuple[float, float] = option(
        (0.0, 1.0), least=0, greatest=1, help="levels of noise, both included, between which it acts; 1 is pure noise"
    )
    schedule: Curve = option(
        "constant",
        help="its strength at a level of noise l, as a share of what it does: linear 2 (1 - l), cosine 1 + cos(pi l)",
    )

    def __post_init__(self) -> None:
        check_window(self.window)

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
        return found[0] if len({*found}) == 1 else like.new_tensor(found).view(-1, *(1,) * (like.ndim - 1))

    @property
    def contrasts(self) -> bool:
        """Whether it needs what is predicted for the negative prompt."""
        return self.NEGATIVE

    @property
    def rows(self) -> int:
        """How many more times the network sees every row where it acts."""
        return self.ROWS

    def rows_at(self, level: float, run: Run) -> int:
        """How many more times the network sees every row in a step of a run from a level at which it acts."""
        return self.rows

    def check(self, network: Network) -> None:
        """Refuse a network that it cannot guide: UserError naming it and the mend."""

    def note(self, network: Network, levels: Sequence[float]) -> str:
        """What a plan says of a run at these levels besides its calls; empty where that is all.

        Raises:
            UserError: it does nothing in such a run.
        """
        return ""

    def begins(self, run: Run) -> None:
        """Refuse a run, as far as it is known, before its first step: UserError naming the mend."""


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
    NEGATIVE: ClassVar[bool] = True

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


class Pull(Term, ABC):
    """A term that adds to the prediction what it finds by calls, or gradients, of its own."""

    @abstractmethod
    def pull(self, p: Tensor, u: Tensor | None, s: Strength, sides: Sides, point: Point) -> Tensor:
        """What it adds [b, ...], s times over, to the prediction p of base and perturbations; u where it `contrasts`
        or a base acts."""


class Control(Term, ABC):
    """A term that changes the prediction that the others have made."""

    @abstractmethod
    def control(self, p: Tensor, c: Tensor, phi: Strength) -> Tensor:
        """The prediction p [b, ...], changed in view of the prompt's c."""


class Canvas(Term, ABC):
    """A term that makes the prediction of the canvas of those of its regions; one at most in a stack."""

    @abstractmethod
    def scales(self, run: Run) -> Sequence[float | None]:
        """Of each of the regions the strength of the base in it; None for the stack's."""

    @abstractmethod
    def parts(self, sides: Sides, point: Point) -> Sequence[Part]:
        """The regions, with everything that they are predicted from."""

    @abstractmethod
    def blend(self, predictions: Sequence[Tensor], point: Point) -> Tensor:
        """The canvas [b, ...] of what was predicted for each of the parts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A region: its latents [b, ...] and the conditions of its rows.

    Attributes:
        place: row and column of the canvas where the first of its latents lies.
        prompt: what `cond` was made of, where that is not the picture's own.
    """

    x: Tensor
    cond: Condition
    uncond: Condition | None
    place: tuple[int, int] = (0, 0)
    prompt: str | None = None


class Edit(Term, ABC):
    """A term that changes the latents where a step starts, the first one too, and at the end.

    Attributes:
        STARTS: whether it says where a run starts; one at most in a stack does.
    """

    STARTS: ClassVar[bool] = False

    @property
    def remembers(self) -> bool:
        # What an edit makes of latents is no step of the chain, and so has no probability.
        return True

    @abstractmethod
    def edit(self, x: Tensor, s: Strength, point: Point) -> Tensor:
        """The latents x [b, ...] of the point, changed; at the end of a run its t is -1, and its levels are 0."""

    def overwrites(self, start: float) -> bool:
        """Whether nothing is left of where a step from this level leads, once the term acts at a later one."""
        return False


class Shaping(Term, ABC):
    """A term that shapes the network in every call of a step."""

    @abstractmethod
    def shaping(
        self, network: Network, arguments: Mapping[str, Any], point: Point, side: str
    ) -> AbstractContextManager[Any]:
        """In the block the network is shaped; entered again where gradients compute it again.

        Args:
            arguments: of the call of the denoiser, filled in when it is made.
            point: where, with the rows of the picture once; the call may see them twice, one side after the other.
            side: which of a step's calls it is: both, prompt, at, or the name of a perturbation, with a number where
                the stack has another one of that name before it.
        """


class Feeding(Term, ABC):
    """A term that adds to what the network is given in every call of a step."""

    @abstractmethod
    def fed(self, network: Network, arguments: Mapping[str, Any], point: Point) -> Mapping[str, Any]:
        """The arguments of a call of the denoiser, with what the term adds; `point` as of `Shaping.shaping`."""


def check_window(window: tuple[float, float]) -> None:
    """Refuse levels of noise that bound nothing: UserError."""
    low, high = window
    if not low < high:
        raise UserError(f"window must be two levels of noise, the lower one first, not {low:g} and {high:g}")


def place(levels: Sequence[float], level: float) -> int | None:
    """Which step of those at the levels stands at a level; None where none does."""
    # Networks that are told their time in other units have it rounded.
    return next((i for i, one in enumerate(levels) if math.isclose(one, level, rel_tol=1e-5)), None)


def rows_of(x: Tensor) -> tuple[int, ...]:
    """The axes of a row: all but the batch."""
    return tuple(range(1, x.ndim))


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of rows, [b, 1, ...]."""
    return (x * y).sum(rows_of(x), keepdim=True)
