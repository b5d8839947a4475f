"""A stack on a stock pipeline: its denoiser's `forward` is replaced, and everything else is the pipeline's own.

Pipelines combine two predictions as u + w (c - u) or c + g (c - u), some with a norm after it. Where both are the same
tensor, each of these gives that tensor to the bit; so the guided prediction stands on both sides. In a pipeline that
makes two calls it takes the place of what the first one gave while the second one is answered.

Latents and predictions are brought to our shape [b, c, (f), h, w] and back, which moves values and changes none. Where
terms edit latents, the sampler's `step` is replaced, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from visiontune.core import Condition
from visiontune.errors import UserError
from visiontune.guidance._native import Arguments, Native, rows_within, stacked, value_of, with_value
from visiontune.guidance._network import Network
from visiontune.guidance._run import Called, fed, shaped
from visiontune.guidance._taps import Forward, bound, replaced
from visiontune.guidance.base import Canvas, Control, Part, Perturbed, Point, Run, Term
from visiontune.models._structure import Structure

if TYPE_CHECKING:
    from visiontune.guidance.stack import GuidanceStack

# Samplers of one step that take latents as the network does; others keep what was predicted before an edit.
_SINGLE = ("DDIMScheduler", "DDPMScheduler", "FlowMatchEulerDiscreteScheduler")
_guided: WeakSet[nn.Module] = WeakSet()


@contextmanager
def attached(
    stack: GuidanceStack, network: Network, pipe: Any, model: Any, prompts: Sequence[str] | None
) -> Iterator[None]:
    """In the block, the pipeline's denoiser gives what makes the pipeline's prediction that of the stack.

    Args:
        model: of a family, around the pipeline; None without one. prompts: of the pictures; None where not known.
    """
    denoiser, guides = network.denoiser, []

    def make(name: str, forward: Forward) -> Forward:
        guide = _Guide(stack, network, pipe, model, prompts, forward)
        guides.append(guide)

        @functools.wraps(forward)
        def guided(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) if guide.own else guide(bound(forward, args, kwargs))

        return guided

    if denoiser in _guided:
        raise UserError("a stack is attached to this pipeline already: put the terms of both into one")
    _guided.add(denoiser)
    try:
        with ExitStack() as entered:
            entered.enter_context(replaced({"": denoiser}, make))
            if stack.edits:
                entered.enter_context(_edited(guides[0], pipe.scheduler))
            yield
        guides[0].finish()
    finally:
        _guided.discard(denoiser)


@contextmanager
def _edited(guide: _Guide, scheduler: Any) -> Iterator[None]:
    """In the block, the sampler steps from latents, and to latents, that the stack has edited."""
    name = type(scheduler).__name__
    if name not in _SINGLE:
        raise UserError(
            f"{guide.stack.edits[0].name} edits latents between the steps, of which the sampler {name} keeps something "
            "or which it scales: set scheduler to ddim (flow models: euler)"
        )
    step = scheduler.step

    def stepped(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = step(model_output, timestep, guide.started(sample), *args, **kwargs)
        return with_value(found, guide.arrived(value_of(found), timestep))

    scheduler.step = stepped
    try:
        yield
    finally:
        del scheduler.step


@dataclass
class _Waiting:
    """The first of two calls of a step.

    Attributes:
        arguments: of the call. prediction: what it gave; None where regions are predicted in its place. value: the
            tensor that the pipeline holds.
        added: what the perturbations add to either side, where the pipeline's own guidance stays; None where the stack
            says how the negative prompt acts. acts: whether it does at this step.
    """

    arguments: Arguments
    prediction: Tensor | None
    value: Tensor
    added: Tensor | None
    acts: bool


@dataclass(eq=False)
class _Guide:
    """The denoiser's `forward` on a guided pipeline.

    Attributes:
        found: what the network gave last, unperturbed, as it gave it.
        steps: the sampler's timesteps, a new tensor in every run. run_of: the run that they are of.
        memory: of the terms, in one run.
        start: the edited latents of the first step, until the sampler takes them. arguments: of the last call.
        own: whether the network is called by a term, and not by the pipeline.
    """

    stack: GuidanceStack
    network: Network
    pipe: Any
    model: Any
    prompts: Sequence[str] | None
    forward: Forward
    found: Any = None
    waiting: _Waiting | None = None
    steps: Any = None
    run_of: Run = field(default_factory=Run)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    start: Tensor | None = None
    arguments: Arguments = field(default_factory=dict)
    own: bool = False

    @property
    def structure(self) -> Structure:
        assert self.network.structure is not None
        return self.network.structure

    @property
    def native(self) -> Native:
        return Native(self.structure, self.network.denoiser)

    def __call__(self, arguments: Arguments) -> Any:
        if self.pipe.scheduler.timesteps is not self.steps:
            self.finish()
            self._begin(arguments)
        if self.start is not None:
            sides = 2 if self._is_doubled(arguments) else 1
            arguments = self.native.with_latents(arguments, torch.cat([self.start] * sides))
        self.arguments = arguments
        if self.stack.edits and self.stack.is_lost(self._point(arguments).levels, self.run_of):
            return self.native.blank(arguments)
        if self.stack.told is not None:
            levels = self._point(arguments).levels
            scale = self.stack.told.telling(levels, self.native.latents(arguments).device)
            arguments |= self.structure.telling(self.network.denoiser, scale)
        return self._apart(arguments) if self.structure.sides == "apart" else self._together(arguments)

    def _begin(self, arguments: Arguments) -> None:
        """A run begins: its latents are edited before the network sees them."""
        self.steps = self.pipe.scheduler.timesteps
        self.memory.clear()
        schedule = self.network.schedule
        levels = [] if schedule is None else (self.steps.clamp(min=0) / schedule.num_train_timesteps).tolist()
        x = self.native.latents(arguments)
        self.run_of = Run(model=self.model, levels=tuple(levels), shape=tuple(x.shape[1:]), prompts=self.prompts)
        self.stack.check(self.network, self.run_of)
        if not self.stack.edits:
            return
        x = x[: len(x) // 2] if self._is_doubled(arguments) else x
        self.start = self._edit(x, float(self.steps[0]))

    def started(self, sample: Tensor) -> Tensor:
        """The latents from which the sampler steps: those that were edited, in its own first step."""
        start, self.start = self.start, None
        return sample if start is None else self._as_sampled(start, sample)

    def arrived(self, sample: Tensor, timestep: Any) -> Tensor:
        """What the sampler stepped to, edited."""
        at = int((self.steps - timestep).abs().argmin())
        # The last step leads to the end, which is cleaner than any level.
        following = float(self.steps[at + 1]) if at + 1 < len(self.steps) else -1.0
        edited = self._edit(self.structure.canonical(sample, self.arguments), following)
        return self._as_sampled(edited, sample)

    def _as_sampled(self, x: Tensor, sample: Tensor) -> Tensor:
        return self.structure.native(x, self.arguments).to(sample).view_as(sample)

    def _edit(self, x: Tensor, time: float) -> Tensor:
        assert self.network.schedule is not None
        level = max(time, 0.0) / self.network.schedule.num_train_timesteps
        t = x.new_full((len(x),), time, dtype=self.steps.dtype)
        with self._own():
            return self.stack.edited(x, lambda term: self._at(x, t, [level] * len(x), term), level)

    @contextmanager
    def _own(self) -> Iterator[None]:
        """In the block, calls of the network are a term's own."""
        before, self.own = self.own, True
        try:
            yield
        finally:
            self.own = before

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
            return self._packed(self._guided(_Sides(self, arguments))[0], arguments)
        rows = len(arguments[self.structure.noisy])
        halves = [rows_within(arguments, rows, part) for part in (slice(0, rows // 2), slice(rows // 2, rows))]
        at = 0 if self.structure.sides == "prompt first" else 1

        def both() -> tuple[Tensor, Tensor]:
            sides = self.run(arguments, "both").chunk(2)
            return sides[1 - at], sides[at]

        if self.stack.base is not None:
            p, _ = self._guided(_Sides(self, halves[at], both=both, negative=halves[1 - at]))
            return self._packed(torch.cat([p, p]), arguments)
        u, c = both()
        _, added = self._guided(_Sides(self, halves[at], c=c), plain=False)
        if not added.ndim:
            return self.found
        return self._packed(torch.cat([c + added, u + added] if at == 0 else [u + added, c + added]), arguments)

    def _is_doubled(self, arguments: Arguments) -> bool:
        """Whether the rows stand there twice, since the pipeline guides. Some pipelines say it themselves."""
        if self.structure.sides == "apart":
            return False
        noisy = stacked(arguments[self.structure.noisy])
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
        levels = self._point(arguments).levels
        # Regions are predicted in the place of the whole.
        c = None if self.stack.cuts(levels) else self.run(arguments, "both")
        acts = self.stack.base is not None and self.stack.asks_negative(levels)
        p, added = c, None
        # Where the negative prompt acts, there is nothing to guide before it is known.
        if not acts:
            p, added = self._guided(_Sides(self, arguments, c=c), plain=self.stack.base is not None)
        given = self.native.blank(arguments) if p is None else self.found if p is c else self._packed(p, arguments)
        self.waiting = _Waiting(arguments, p, value_of(given), None if self.stack.base else added, acts)
        return given

    def _answer(self, waiting: _Waiting, arguments: Arguments) -> Any:
        """The second call of a step."""
        if waiting.added is not None:
            u = self.run(arguments, "both")
            return self._packed(u + waiting.added, arguments) if waiting.added.ndim else self.found
        c = waiting.prediction
        if not waiting.acts:
            assert c is not None
            return self._packed(c, arguments)

        def both() -> tuple[Tensor, Tensor]:
            assert c is not None
            return self.run(arguments, "both"), c

        p, _ = self._guided(_Sides(self, waiting.arguments, c=c, both=both, negative=arguments))
        given = self._packed(p, arguments)
        waiting.value.copy_(value_of(given))
        return given

    def _is_other_side(self, one: Arguments, other: Arguments) -> bool:
        return all(
            torch.equal(one[name], other[name]) for name in (self.structure.noisy, self.structure.told) if name in one
        )

    # -- the network -----------------------------------------------------------------------------------------------

    def run(self, arguments: Arguments, side: str) -> Tensor:
        """What the network predicts, [rows, ...] in our sign and shape; `side` as of `Shaping.shaping`."""
        self.found, prediction = self._ran(arguments, side)
        return prediction

    def worse(self, arguments: Arguments, term: Perturbed) -> Tensor:
        """What it predicts when a term has made it worse."""
        return self._ran(arguments, self.stack.side(term), term)[1]

    def _ran(self, arguments: Arguments, side: str, worse: Perturbed | None = None) -> tuple[Any, Tensor]:
        def point(term: Term) -> Point:
            return self._point(self.arguments, term)

        with shaped(self.stack, self.network, arguments, point, side, worse) as check:
            found = self.forward(**fed(self.stack, self.network, point, arguments))
        check()
        return found, self.native.prediction(found, arguments)

    def predict(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """What the model predicts, for terms that bring conditions of their own."""
        with self._own():
            found: Tensor = self.model.predict(x, t, cond)
            return found

    def _packed(self, p: Tensor, arguments: Arguments) -> Any:
        return self.native.packed(p, arguments, self.native.blank(arguments) if self.found is None else self.found)

    # -- the stack -------------------------------------------------------------------------------------------------

    def _guided(self, sides: _Sides, plain: bool = True) -> tuple[Tensor, Tensor]:
        """As of `GuidanceStack.combine`; not `plain` where the pipeline's own guidance comes on top."""
        point = self._point(sides.arguments)
        for term in self.stack.terms if not plain else ():
            if term.acts(point.levels) and (isinstance(term, Control | Canvas) or term.contrasts):
                raise UserError(
                    f"the pipeline guides by itself, on top of what {term.name} has made of the prediction: put cfg "
                    "into the stack, too, or call the pipeline without guidance"
                )
        return self.stack.combine(sides, lambda term: self._point(sides.arguments, term), point.levels)

    def _point(self, arguments: Arguments, term: Term | None = None) -> Point:
        """Of the rows of a call; for a term those of `self.arguments` count once, though they may stand there twice."""
        x, told = self.native.latents(arguments), arguments.get(self.structure.told)
        if term is not None and arguments is self.arguments and self._is_doubled(arguments):
            x, told = (rows_within(one, len(x), slice(len(x) // 2)) for one in (x, told))
        if self.structure.time is None or self.network.schedule is None:
            level = (x == self.pipe.scheduler.config.mask_token_id).flatten(1).float().mean(1)
            return self._at(x, level, level.tolist(), term)
        t = self.structure.time(torch.as_tensor(told, device=x.device)).expand(len(x))
        level = t.clamp(min=0) / self.network.schedule.num_train_timesteps
        return self._at(x, t, level.tolist(), term)

    def _at(self, x: Tensor, t: Tensor, levels: list[float], term: Term | None) -> Point:
        memory = {} if term is None else self.memory.setdefault(id(term), {})
        return Point(x=x, t=t, levels=levels, schedule=self.network.schedule, run=self.run_of, memory=memory)

    def _one_sided(self) -> UserError:
        return UserError(
            "the stack guides away from a negative prompt, which the pipeline does not predict: call it with a "
            "guidance_scale above 1 (FLUX: true_cfg_scale, and a negative_prompt); its value is then the stack's"
        )


@dataclass(eq=False)
class _Sides:
    """`Sides` of a pipeline's call: the arguments of the prompt's rows and of the negative prompt's, what is known, and
    how both are predicted."""

    guide: _Guide
    arguments: Arguments
    c: Tensor | None = None
    both: Callable[[], tuple[Tensor, Tensor]] = lambda: _unknown()
    negative: Arguments | None = None

    def prompt(self) -> Tensor:
        return self.guide.run(self.arguments, "prompt") if self.c is None else self.c

    def worse(self, term: Perturbed) -> Tensor:
        return self.guide.worse(self.arguments, term)

    def at(self, x: Tensor, cond: Condition | None = None) -> Tensor:
        if cond is not None:
            return self._called(cond, None).at(x)
        return self.guide.run(self.guide.native.with_latents(self.arguments, x), "at")

    def of(self, part: Part, point: Callable[[Term], Point]) -> Called:
        return self._called(part.cond, part.uncond).of(part, point)

    def conditions(self) -> tuple[Condition, Condition | None]:
        condition = self.guide.structure.condition
        return condition(self.arguments), None if self.negative is None else condition(self.negative)

    def _called(self, cond: Condition, uncond: Condition | None) -> Called:
        """Calls of the model, with conditions that are none of the pipeline's."""
        guide, at = self.guide, self.guide._point(self.arguments)
        return Called(
            guide.stack,
            guide.network,
            guide.predict,
            lambda term: guide._point(self.arguments, term),
            at.x,
            at.t,
            cond,
            uncond,
        )


def _unknown() -> tuple[Tensor, Tensor]:
    raise AssertionError("one side alone is known")
