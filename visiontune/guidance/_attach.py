"""A stack on a stock pipeline: its denoiser's `forward` is replaced, and everything else is the pipeline's own.

Pipelines combine two predictions as u + w (c - u) or c + g (c - u), some with a norm after it. Where both are the same
tensor, each of these gives that tensor to the bit; so the guided prediction stands on both sides. In a pipeline that
makes two calls it takes the place of what the first one gave while the second one is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.guidance._taps import Forward, Inside, bound, replaced
from visiontune.guidance.base import Control, Perturbed, Point, Term
from visiontune.models._structure import Structure

if TYPE_CHECKING:
    from visiontune.guidance.stack import GuidanceStack

Arguments = dict[str, Any]
_guided: WeakSet[nn.Module] = WeakSet()


@contextmanager
def attached(stack: GuidanceStack, network: Network, pipe: Any) -> Iterator[None]:
    """In the block, the pipeline's denoiser gives what makes the pipeline's prediction that of the stack."""
    denoiser, guides = network.denoiser, []

    def make(name: str, forward: Forward) -> Forward:
        guides.append(_Guide(stack, network, pipe, forward))
        return lambda *args, **kwargs: guides[0](bound(forward, args, kwargs))

    if denoiser in _guided:
        raise UserError("a stack is attached to this pipeline already: put the terms of both into one")
    _guided.add(denoiser)
    try:
        with replaced({"": denoiser}, make):
            yield
        guides[0].finish()
    finally:
        _guided.discard(denoiser)


@dataclass
class _Waiting:
    """The first of two calls of a step.

    Attributes:
        arguments: of the call. prediction: what it gave. value: the tensor that the pipeline holds.
        added: what the perturbations add to either side, where the pipeline's own guidance stays; None where the stack
            says how the negative prompt acts. acts: whether it does at this step.
    """

    arguments: Arguments
    prediction: Tensor
    value: Tensor
    added: Tensor | None
    acts: bool


@dataclass(eq=False)
class _Guide:
    """The denoiser's `forward` on a guided pipeline.

    Attributes:
        found: what the network gave last, unperturbed, as it gave it.
        steps: the sampler's timesteps, a new tensor in every run.
        memory: of the terms, in one run.
    """

    stack: GuidanceStack
    network: Network
    pipe: Any
    forward: Forward
    found: Any = None
    waiting: _Waiting | None = None
    steps: Any = None
    memory: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def structure(self) -> Structure:
        assert self.network.structure is not None
        return self.network.structure

    def __call__(self, arguments: Arguments) -> Any:
        if self.pipe.scheduler.timesteps is not self.steps:
            self.finish()
            self.steps = self.pipe.scheduler.timesteps
            self.memory.clear()
        if self.stack.told is not None:
            levels = self._point(arguments).levels
            arguments["guidance"] = self.stack.told.telling(levels, arguments["guidance"].device)
        return self._apart(arguments) if self.structure.sides == "apart" else self._together(arguments)

    def finish(self) -> None:
        """Say that a run ended, or went on, without the negative prompt that the stack guides away from."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None and waiting.acts:
            raise self._one_sided()

    # -- pipelines that predict both sides in one call -------------------------------------------------------------

    def _together(self, arguments: Arguments) -> Any:
        if not self._is_doubled(arguments):
            if self.stack.contrasts:
                raise self._one_sided()
            return self._packed(self._guided(_Sides(self, arguments))[0])
        rows = len(arguments[self.structure.noisy])
        halves = [_rows(arguments, rows, part) for part in (slice(0, rows // 2), slice(rows // 2, rows))]
        at = 0 if self.structure.sides == "prompt first" else 1

        def both() -> tuple[Tensor, Tensor]:
            sides = self.run(arguments).chunk(2)
            return sides[1 - at], sides[at]

        if self.stack.base is not None:
            p, _ = self._guided(_Sides(self, halves[at], both=both))
            return self._packed(torch.cat([p, p]))
        u, c = both()
        _, added = self._guided(_Sides(self, halves[at], c=c), plain=False)
        if not added.ndim:
            return self.found
        return self._packed(torch.cat([c + added, u + added] if at == 0 else [u + added, c + added]))

    def _is_doubled(self, arguments: Arguments) -> bool:
        """Whether the rows stand there twice, since the pipeline guides. Some pipelines say it themselves."""
        noisy = _stacked(arguments[self.structure.noisy])
        if getattr(self.pipe, "do_classifier_free_guidance", True) is False or len(noisy) % 2:
            return False
        return torch.equal(*noisy.chunk(2))

    # -- pipelines that make two calls -----------------------------------------------------------------------------

    def _apart(self, arguments: Arguments) -> Any:
        waiting = self.waiting
        if waiting is not None and self._is_other_side(waiting.arguments, arguments):
            self.waiting = None
            return self._answer(waiting, arguments)
        self.finish()
        c = self.run(arguments)
        acts = self.stack.base is not None and self.stack.base.acts(self._point(arguments).levels)
        # Where the negative prompt acts, there is nothing to guide before it is known.
        p, added = (c, None) if acts else self._guided(_Sides(self, arguments, c=c), plain=self.stack.base is not None)
        given = self.found if p is c else self._packed(p)
        self.waiting = _Waiting(arguments, p, _value(given), None if self.stack.base else added, acts)
        return given

    def _answer(self, waiting: _Waiting, arguments: Arguments) -> Any:
        """The second call of a step."""
        if waiting.added is not None:
            u = self.run(arguments)
            return self._packed(u + waiting.added) if waiting.added.ndim else self.found
        if not waiting.acts:
            return self._packed(waiting.prediction)
        c = waiting.prediction
        p, _ = self._guided(_Sides(self, waiting.arguments, c=c, both=lambda: (self.run(arguments), c)))
        given = self._packed(p)
        waiting.value.copy_(_value(given))
        return given

    def _is_other_side(self, one: Arguments, other: Arguments) -> bool:
        return all(
            torch.equal(one[name], other[name]) for name in (self.structure.noisy, self.structure.told) if name in one
        )

    # -- the network -----------------------------------------------------------------------------------------------

    def run(self, arguments: Arguments) -> Tensor:
        """What the network predicts, [rows, ...] in our sign."""
        self.found = self.forward(**arguments)
        return self.prediction(self.found, arguments)

    def prediction(self, found: Any, arguments: Arguments) -> Tensor:
        """Of what the network gave, the part that is of its noisy input; some give a variance behind it."""
        value = _stacked(_value(found))
        noisy = arguments[self.structure.noisy]
        return self.structure.sign * (value[:, : noisy.shape[1]] if self._has_more(value, noisy) else value)

    def _has_more(self, value: Tensor, noisy: Any) -> bool:
        return isinstance(noisy, Tensor) and noisy.ndim == value.ndim and value.shape[1] > noisy.shape[1]

    def _packed(self, p: Tensor) -> Any:
        """A prediction as the network gave its last one."""
        value = _value(self.found)
        made = self.structure.sign * p
        if isinstance(value, list):
            return _with_value(self.found, list(made.to(value[0]).unbind()))
        if value.shape[1] > made.shape[1]:
            behind = value[:, made.shape[1] :]
            made = torch.cat([made, torch.cat([behind] * (len(made) // len(behind)))], dim=1)
        return _with_value(self.found, made.to(value))

    # -- the stack -------------------------------------------------------------------------------------------------

    def _guided(self, sides: _Sides, plain: bool = True) -> tuple[Tensor, Tensor]:
        """As of `GuidanceStack.combine`; not `plain` where the pipeline's own guidance comes on top."""
        point = self._point(sides.arguments)
        if not plain and any(isinstance(term, Control) and term.acts(point.levels) for term in self.stack.terms):
            raise UserError(
                "the pipeline guides by itself, after the terms of the stack that bound the prediction: put cfg into "
                "the stack, too, or call the pipeline without guidance"
            )
        return self.stack.combine(sides, lambda term: self._point(sides.arguments, term), point.levels)

    def _point(self, arguments: Arguments, term: Term | None = None) -> Point:
        x = _stacked(arguments[self.structure.noisy])
        memory = {} if term is None else self.memory.setdefault(id(term), {})
        if self.structure.time is None or self.network.schedule is None:
            level = (x == self.pipe.scheduler.config.mask_token_id).flatten(1).float().mean(1)
            return Point(x=x, t=level, levels=level.tolist(), schedule=None, memory=memory)
        t = self.structure.time(torch.as_tensor(arguments[self.structure.told], device=x.device)).expand(len(x))
        level = t.clamp(min=0) / self.network.schedule.num_train_timesteps
        return Point(x=x, t=t, levels=level.tolist(), schedule=self.network.schedule, memory=memory)

    def _one_sided(self) -> UserError:
        return UserError(
            "the stack guides away from a negative prompt, which the pipeline does not predict: call it with a "
            "guidance_scale above 1 (FLUX: true_cfg_scale, and a negative_prompt); its value is then the stack's"
        )


@dataclass(eq=False)
class _Sides:
    """`Sides` of a pipeline's call: the arguments of the prompt's rows, what is known, and how both are predicted."""

    guide: _Guide
    arguments: Arguments
    c: Tensor | None = None
    both: Callable[[], tuple[Tensor, Tensor]] = lambda: _unknown()

    def prompt(self) -> Tensor:
        return self.guide.run(self.arguments) if self.c is None else self.c

    def worse(self, term: Perturbed) -> Tensor:
        inside = Inside(lambda: term.worse(self.guide.network, self.arguments))
        with inside.around(self.guide.network.denoiser) as check:
            found = self.guide.forward(**self.arguments)
        if check is not None:
            check()
        return self.guide.prediction(found, self.arguments)


def _unknown() -> tuple[Tensor, Tensor]:
    raise AssertionError("one side alone is known")


def _value(found: Any) -> Any:
    """The prediction in what a network gave: itself, or the first of a tuple or an output of diffusers."""
    return found if isinstance(found, Tensor) else found[0]


def _with_value(found: Any, value: Any) -> Any:
    if isinstance(found, Tensor):
        return value
    if isinstance(found, tuple):
        return (value, *found[1:])
    return type(found)(**{**found, next(iter(found)): value})


def _stacked(rows: Tensor | list[Tensor]) -> Tensor:
    return torch.stack(rows) if isinstance(rows, list) else rows


def _rows(value: Any, rows: int, part: slice) -> Any:
    """Of whatever has one entry a row, those of a part."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim and len(value) == rows else value
    if isinstance(value, list):
        return value[part] if len(value) == rows else value
    if isinstance(value, dict):
        return {key: _rows(item, rows, part) for key, item in value.items()}
    return value
