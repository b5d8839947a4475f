"""`GuidanceStack`: terms put together, for rollouts and for stock pipelines alike.

stack = GuidanceStack([cfg.Config(scale=4), pag.Config(scale=2)])
rollout(model, cond, guidance=stack)
model.draw(requests, steps=25, guidance=stack)
with stack.attach(pipe):
    pipe("a red circle")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from visiontune import plugin
from visiontune.core import Condition
from visiontune.diffusion.guidance import CFG, NO_GUIDANCE, Call, Embedded, Guidance, both_sides
from visiontune.errors import UserError
from visiontune.guidance import _attach
from visiontune.guidance._network import Network
from visiontune.guidance._taps import Inside, bound
from visiontune.guidance.base import Base, Control, Perturbed, Point, Term, Told


class Sides(Protocol):
    """The calls of a network that a stack makes at one point."""

    def both(self) -> tuple[Tensor, Tensor]:
        """What is predicted for the negative prompt and for the prompt."""

    def prompt(self) -> Tensor:
        """What is predicted for the prompt alone."""

    def worse(self, term: Perturbed) -> Tensor:
        """What the network predicts for the prompt when a term has made it worse."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stack costs, step by step.

    Attributes:
        levels: of noise. acting: names of the terms that act. rows: how often the network sees each picture.
    """

    levels: tuple[float, ...]
    acting: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...]

    def __str__(self) -> str:
        steps = enumerate(zip(self.levels, self.rows, self.acting, strict=True), start=1)
        lines = [
            f"step {i}: noise {level:.3f}, {rows} a picture: {', '.join(names)}" for i, (level, rows, names) in steps
        ]
        return "\n".join([*lines, f"in all {sum(self.rows)} a picture, {len(self.rows)} without guidance"])


@dataclass(frozen=True)
class GuidanceStack(Guidance):
    """Terms that guide together: at most one `Base`, then those that perturb, then those that control the norm.

    Args:
        terms: in any order; those of a kind act in the order given.

    Raises:
        UserError: two terms that exclude each other.
    """

    terms: Sequence[Term]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        for kind, what in ((Base, "say how the negative prompt acts"), (Told, "say what the network is told")):
            names = [term.name for term in self.terms if isinstance(term, kind)]
            if len(names) > 1:
                raise UserError(f"{' and '.join(names)} both {what}: leave one out")

    @staticmethod
    def of(specs: Sequence[str | Mapping[str, Any]], path: str = "guidance") -> GuidanceStack:
        """The stack that a recipe lists: `[{cfg: 4}, {pag: {scale: 2, layers: mid}}, rescale]`.

        Args:
            specs: of each term its name, or a mapping from its name to its options, or to its `scale` alone.
            path: where the list stands, for messages.

        Raises:
            UserError: naming what is wrong and where.
        """
        return GuidanceStack([_term(spec, f"{path}[{i}]") for i, spec in enumerate(specs)])

    def over(self, own: Guidance) -> GuidanceStack:
        """The stack on top of a family's own guidance, unless a term of it takes the place of that.

        Args:
            own: as from a model's `guidance(scale)`.

        Raises:
            UserError: the family guides in a way that is none of the terms'.
        """
        if self.base or self.told or own == NO_GUIDANCE:
            return self
        beneath = {CFG: "cfg", Embedded: "embedded"}.get(type(own))
        if beneath is None:
            raise UserError(
                f"the model's own guidance ({type(own).__name__}) is none of a stack's terms: put cfg among them, "
                "in its place"
            )
        return GuidanceStack([_term({beneath: own.scale}, beneath), *self.terms])  # type: ignore[attr-defined]

    @property
    def base(self) -> Base | None:
        """The term that says how the negative prompt acts."""
        return next((term for term in self.terms if isinstance(term, Base)), None)

    @property
    def told(self) -> Told | None:
        """The term that the network is told."""
        return next((term for term in self.terms if isinstance(term, Told)), None)

    @property
    def contrasts(self) -> bool:
        return self.base is not None and not self.base.idle

    @property
    def remembers(self) -> bool:
        return any(term.remembers for term in self.terms)

    def __call__(
        self, call: Call, x: Tensor, t: Tensor, level: Tensor, cond: Condition, uncond: Condition | None
    ) -> Tensor:
        raise ValueError("a stack guides one run of a model: call what begin(model) gives")

    def begin(self, model: Any, levels: Sequence[float] | None = None) -> Guidance:
        network = Network.of_model(model)
        self.check(network, levels)
        return _Begun(stack=self, network=network)

    def check(self, network: Network, levels: Sequence[float] | None = None) -> None:
        """Refuse a network that a term cannot guide, and levels at none of which it acts; UserError as for `begin`."""
        for term in self.terms:
            if term.idle:
                continue
            term.check(network)
            if levels and not term.acts(levels):
                raise UserError(
                    f"{term.name} acts at none of the steps, which stand at levels of noise from {max(levels):.3g} to "
                    f"{min(levels):.3g}: move its window, which is {list(term.window)}"
                )

    def plan(self, model: Any, steps: int) -> Plan:
        """What a run of a model's own sampler costs, found without one.

        Raises:
            UserError: as `begin`.
        """
        if hasattr(model, "chain"):
            start, _ = model.chain(steps, model.latent_shape())
            levels = (start.clamp(min=0) / model.schedule.num_train_timesteps).tolist()
        else:
            # The share of tokens that are masked; see `visiontune.diffusion.unmask`.
            levels = [math.cos(math.pi / 2 * i / steps) for i in range(steps)]
        self.check(Network.of_model(model), levels)
        acting = [tuple(term for term in self.terms if term.acts([level])) for level in levels]
        return Plan(
            levels=tuple(levels),
            acting=tuple(tuple(term.name for term in terms) for terms in acting),
            rows=tuple(1 + sum(term.ROWS for term in terms) for terms in acting),
        )

    def stock(self) -> Guidance:
        # Any scale but 1 has the pipeline predict both sides; what it makes of them is left as it is.
        return CFG(scale=2.0) if self.contrasts else NO_GUIDANCE

    def attach(self, model: Any) -> AbstractContextManager[Any]:
        """In the block, a stock pipeline guides in this way; after it, everything is as it was.

        Where the stack has a `Base` that acts, call the pipeline with guidance of its own, of any scale, so that it
        predicts the negative prompt, too. Without one, what the pipeline does by itself stays, and the stack is added
        to it.

        Args:
            model: a stock diffusers pipeline of one of the families, or a model around one.

        Raises:
            UserError: the pipeline cannot be guided so.
        """
        pipe = getattr(model, "pipe", model)
        network = Network.of_pipeline(pipe)
        self.check(network)
        return _attach.attached(self, network, pipe)

    def combine(self, sides: Sides, point: Callable[[Term], Point], levels: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The guided prediction, and what of it the perturbations have added (0 where they do not act).

        Args:
            sides: the network's calls. point: of a term, with its memory. levels: of noise, of the rows.
        """
        base = self.base
        if base is not None and base.acts(levels):
            u, c = sides.both()
            p = base.combine(u, c, base.amount(levels, c), point(base))
        else:
            p = c = sides.prompt()
        added = c.new_zeros(())
        for term in self.terms:
            if isinstance(term, Perturbed) and term.acts(levels):
                added = added + term.difference(c, sides.worse(term), term.amount(levels, c))
        if added.ndim:
            p = p + added
        for term in self.terms:
            if isinstance(term, Control) and term.acts(levels):
                p = term.control(p, c, term.amount(levels, c))
        return p, added


@dataclass(frozen=True, kw_only=True, eq=False)
class _Begun(Guidance):
    """A stack on the network of one run."""

    stack: GuidanceStack
    network: Network
    memory: dict[int, dict[str, Tensor]] = field(default_factory=dict)

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
        if self.stack.told is not None:
            cond = replace(cond, extra={**cond.extra, "guidance": self.stack.told.telling(levels, x.device)})
        sides = _Called(self.network, call, x, t, cond, uncond)
        at = Point(x=x, t=t, levels=levels, schedule=self.network.schedule)
        return self.stack.combine(sides, lambda term: replace(at, memory=self._memory(term)), levels)[0]

    def _memory(self, term: Term) -> dict[str, Tensor]:
        return self.memory.setdefault(id(term), {})


@dataclass(frozen=True)
class _Called:
    """`Sides` of our own calls of a model."""

    network: Network
    call: Call
    x: Tensor
    t: Tensor
    cond: Condition
    uncond: Condition | None

    def both(self) -> tuple[Tensor, Tensor]:
        if self.uncond is None:
            raise ValueError("guidance needs the condition that it guides away from")
        return both_sides(self.call, self.x, self.t, self.cond, self.uncond)

    def prompt(self) -> Tensor:
        return self.call(self.x, self.t, self.cond)

    def worse(self, term: Perturbed) -> Tensor:
        arguments: dict[str, Any] = {}
        inside = Inside(lambda: term.worse(self.network, arguments))
        with _noted(self.network, arguments), inside.around(self.network.denoiser) as check:
            found = self.prompt()
        if check is not None:
            check()
        return found


@contextmanager
def _noted(network: Network, arguments: dict[str, Any]) -> Iterator[None]:
    """In the block, calls of the denoiser leave what they were given in `arguments`."""

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments.update(bound(module.forward, args, kwargs))

    handle = network.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _term(spec: str | Mapping[str, Any], path: str) -> Term:
    options: Any = {}
    if isinstance(spec, Mapping):
        if len(spec) != 1:
            raise UserError(f"{path} must be a term and its options, such as {{pag: {{scale: 2}}}}, not {dict(spec)}")
        ((spec, options),) = spec.items()
    given = options if isinstance(options, Mapping) else {"scale": options}
    if "name" in given:
        raise UserError(f"{path} is called '{spec}' already: take name out of its options")
    module, config = plugin.configure("guidance", {**given, "name": spec}, path)
    term = plugin.build(module, config, path)
    if not isinstance(term, Base | Perturbed | Control | Told):
        raise UserError(f"{path}: build of '{spec}' gives no Base, Perturbed, Control or Told")
    return term
