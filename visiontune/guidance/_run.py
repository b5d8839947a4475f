"""A stack on the network of one run of our own: `Sides` that are calls of a model."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion.guidance import Call, Guidance, both_sides
from visiontune.guidance._network import Network
from visiontune.guidance._taps import Inside, noted
from visiontune.guidance.base import Part, Perturbed, Point, Run, Term

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from visiontune.guidance.stack import GuidanceStack


@dataclass(frozen=True, kw_only=True, eq=False)
class Begun(Guidance):
    """A stack in one run, where its memory is."""

    stack: GuidanceStack
    network: Network
    run: Run
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def contrasts(self) -> bool:
        return self.stack.contrasts

    @property
    def remembers(self) -> bool:
        return self.stack.remembers

    def __call__(
        self, call: Call, x: Tensor, t: Tensor, level: Tensor, cond: Condition, uncond: Condition | None
    ) -> Tensor:
        levels = level.tolist()
        if self.stack.is_lost(levels, self.run):
            return torch.zeros_like(x)
        point = self._points(x, t, levels)
        sides = Called(self.stack, self.network, call, point, x, t, cond, uncond)
        return self.stack.combine(sides, point, levels)[0]

    def edit(self, x: Tensor, t: Tensor) -> Tensor:
        if not self.stack.edits or self.network.schedule is None:
            return x
        level = float(t.clamp(min=0)) / self.network.schedule.num_train_timesteps
        return self.stack.edited(x, self._points(x, t.to(x.device).expand(len(x)), [level] * len(x)), level)

    def _points(self, x: Tensor, t: Tensor, levels: Sequence[float]) -> Callable[[Term], Point]:
        run = replace(self.run, shape=tuple(x.shape[1:]))
        at = Point(x=x, t=t, levels=levels, schedule=self.network.schedule, run=run)
        return lambda term: replace(at, memory=self.memory.setdefault(id(term), {}))


@dataclass(frozen=True)
class Called:
    """`Sides` that are calls of a model.

    Args:
        call: (x, t, condition) -> prediction. point: of a term.
        x, t: latents [b, ...] and their times [b]. cond, uncond: of the rows.
    """

    stack: GuidanceStack
    network: Network
    call: Call
    point: Callable[[Term], Point]
    x: Tensor
    t: Tensor
    cond: Condition
    uncond: Condition | None

    def both(self) -> tuple[Tensor, Tensor]:
        if self.uncond is None:
            raise ValueError("guidance needs the condition that it guides away from")
        with self._called("both"):
            return both_sides(self.call, self.x, self.t, self._told(self.cond), self.uncond)

    def prompt(self) -> Tensor:
        return self._plain("prompt", self.x, self.cond)

    def worse(self, term: Perturbed) -> Tensor:
        with self._called(self.stack.side(term), term) as check:
            found = self.call(self.x, self.t, self._told(self.cond))
        check()
        return found

    def at(self, x: Tensor, cond: Condition | None = None) -> Tensor:
        return self._plain("at", x, self.cond if cond is None else cond)

    def of(self, part: Part, point: Callable[[Term], Point]) -> Called:
        return replace(self, point=point, x=part.x, cond=part.cond, uncond=part.uncond)

    def conditions(self) -> tuple[Condition, Condition | None]:
        return self.cond, self.uncond

    def _plain(self, side: str, x: Tensor, cond: Condition) -> Tensor:
        with self._called(side):
            return self.call(x, self.t, self._told(cond))

    def _told(self, cond: Condition) -> Condition:
        told = self.stack.told
        if told is None:
            return cond
        levels = self.point(told).levels
        return replace(cond, extra={**cond.extra, "guidance": told.telling(levels, self.x.device)})

    @contextmanager
    def _called(self, side: str, worse: Perturbed | None = None) -> Iterator[Callable[[], None]]:
        """In the block the network is as the stack, and a perturbation, have it; gives a check for after it."""
        arguments: dict[str, Any] = {}
        with ExitStack() as entered:
            if worse is not None or self.stack.shapes or self.stack.feeds:
                feed = functools.partial(fed, self.stack, self.network, self.point)
                entered.enter_context(noted(self.network.denoiser, arguments, feed if self.stack.feeds else None))
            yield entered.enter_context(shaped(self.stack, self.network, arguments, self.point, side, worse))


def fed(
    stack: GuidanceStack, network: Network, point: Callable[[Term], Point], arguments: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The arguments of a call of the denoiser, with all that the stack's terms add to them."""
    for term in stack.feeds:
        at = point(term)
        if term.acts(at.levels):
            arguments = term.fed(network, arguments, at)
    return arguments


@contextmanager
def shaped(
    stack: GuidanceStack,
    network: Network,
    arguments: Mapping[str, Any],
    point: Callable[[Term], Point],
    side: str,
    worse: Perturbed | None = None,
) -> Iterator[Callable[[], None]]:
    """In the block the network is as the stack's terms shape it, and as a perturbation makes it worse.

    Args:
        arguments: of the denoiser's call in the block. point: of a term. side: as of `Shaping.shaping`.

    Returns:
        What to call after the block: it raises UserError where a term has not reached all its layers.
    """
    reached: list[Callable[[], None] | None] = []
    with ExitStack() as entered:

        def enter(make: Callable[[], AbstractContextManager[Any]]) -> None:
            reached.append(entered.enter_context(Inside(make).around(network.denoiser)))

        for term in stack.shapes:
            at = point(term)
            if term.acts(at.levels):
                enter(functools.partial(term.shaping, network, arguments, at, side))
        if worse is not None:
            enter(functools.partial(worse.worse, network, arguments))
        yield lambda: _each(reached)


def _each(checks: Sequence[Callable[[], None] | None]) -> None:
    for check in checks:
        if check is not None:
            check()
