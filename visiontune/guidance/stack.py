"""`GuidanceStack`: terms put together, for rollouts and for stock pipelines alike.

stack = GuidanceStack([cfg.Config(scale=4), pag.Config(scale=2)])
rollout(model, cond, guidance=stack)
model.draw(requests, steps=25, guidance=stack)
with stack.attach(pipe):
    pipe("a red circle")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from visiontune import plugin
from visiontune.core import Condition
from visiontune.diffusion.guidance import CFG, NO_GUIDANCE, Call, EditCFG, Embedded, Guidance
from visiontune.errors import UserError
from visiontune.guidance import _attach
from visiontune.guidance._network import Network
from visiontune.guidance._run import Begun
from visiontune.guidance.base import (
    Base,
    Canvas,
    Control,
    Edit,
    Feeding,
    Part,
    Perturbed,
    Point,
    Pull,
    Run,
    Shaping,
    Sides,
    Term,
    Told,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stack costs, step by step.

    Attributes:
        levels: of noise. acting: names of the terms that act. rows: how often the network sees each picture.
        notes: what terms say of the run as a whole.
    """

    levels: tuple[float, ...]
    acting: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        steps = enumerate(zip(self.levels, self.rows, self.acting, strict=True), start=1)
        lines = [
            f"step {i}: noise {level:.3f}, {rows} a picture: {', '.join(names)}" for i, (level, rows, names) in steps
        ]
        return "\n".join([*lines, self.total()])

    def total(self) -> str:
        """All steps in one line."""
        names = dict.fromkeys(name for names in self.acting for name in names)
        seen = f"{', '.join(names)}: the network sees each picture {sum(self.rows)} times in {len(self.rows)} steps"
        return "; ".join([seen, *self.notes])


@dataclass(frozen=True)
class GuidanceStack(Guidance):
    """Terms that guide together: at most one `Base`, then what perturbs and pulls, then what controls the norm.

    Args:
        terms: in any order; those of a kind act in the order given.

    Raises:
        UserError: two terms that exclude each other.
    """

    terms: Sequence[Term]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        once = (
            (Base, "say how the negative prompt acts"),
            (Told, "say what the network is told"),
            (Canvas, "say what the canvas is made of"),
        )
        for kind, what in once:
            _one_of([term for term in self.terms if isinstance(term, kind)], what)
        _one_of([term for term in self.edits if term.STARTS], "say where a run starts")

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

    @staticmethod
    def of_options(options: Any, path: str = "guidance") -> GuidanceStack | None:
        """The stack of options that have a `guidance`; None where it is not set.

        Raises:
            UserError: as of `of`.
        """
        return None if options.guidance is None else GuidanceStack.of(options.guidance, path)

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
        return any(term.contrasts and not term.idle for term in self.terms)

    @property
    def remembers(self) -> bool:
        return any(term.remembers and not term.idle for term in self.terms)

    def __call__(
        self, call: Call, x: Tensor, t: Tensor, level: Tensor, cond: Condition, uncond: Condition | None
    ) -> Tensor:
        raise ValueError("a stack guides one run of a model: call what begin(model) gives")

    def begin(
        self,
        model: Any,
        levels: Sequence[float] | None = None,
        whole: bool = True,
        shape: Sequence[int] | None = None,
    ) -> Guidance:
        network, run = Network.of_model(model), Run(model=model, levels=tuple(levels or ()), shape=tuple(shape or ()))
        self.check(network, run if whole else replace(run, levels=()))
        return Begun(stack=self, network=network, run=run)

    def check(self, network: Network, run: Run | None = None) -> None:
        """Refuse a network, and a run, that a term cannot guide; UserError as for `begin`."""
        levels = () if run is None else run.levels
        for term in self.terms:
            if term.idle:
                continue
            term.check(network)
            if network.schedule is None and isinstance(term, Pull | Canvas | Edit):
                raise UserError(f"{term.name} guides latents, and '{network.source}' predicts tokens: take cfg")
            if levels and not term.acts(levels):
                raise UserError(
                    f"{term.name} acts at none of the steps, which stand at levels of noise from {max(levels):.3g} to "
                    f"{min(levels):.3g}: move its window, which is {list(term.window)}"
                )
            if levels:
                term.note(network, levels)
            if run is not None:
                term.begins(run)
                if isinstance(term, Canvas) and self.base is None and any(s is not None for s in term.scales(run)):
                    raise UserError(
                        f"{term.name} gives regions scales of their own, and the stack has no base: put cfg into it"
                    )

    def plan(self, model: Any, steps: int, size: tuple[int, int] | None = None) -> Plan:
        """What a run of a model's own sampler costs, found without one.

        Args:
            size: height and width in pixels, the model's own where they are left open.

        Raises:
            UserError: as `begin`.
        """
        shape: tuple[int, ...] = ()
        if hasattr(model, "chain"):
            shape = model.latent_shape(*(size or ()))
            start, _ = model.chain(steps, shape)
            levels = (start.clamp(min=0) / model.schedule.num_train_timesteps).tolist()
        else:
            # The share of tokens that are masked; see `visiontune.diffusion.unmask`.
            levels = [math.cos(math.pi / 2 * i / steps) for i in range(steps)]
        network, run = Network.of_model(model), Run(model=model, levels=levels, shape=shape, prompts=())
        self.check(network, run)
        notes = (term.note(network, levels) for term in self.terms if not term.idle)
        return Plan(
            levels=tuple(levels),
            acting=tuple(tuple(term.name for term in self.terms if term.acts([level])) for level in levels),
            rows=tuple(0 if self.is_lost([level], run) else self._rows(level, run) for level in levels),
            notes=tuple(filter(None, notes)),
        )

    def _rows(self, level: float, run: Run) -> int:
        """How often a step at a level sees each picture."""
        canvas = self._canvas([level])
        scales = [None] if canvas is None else canvas.scales(run)
        return sum(self._rows_at(level, run, scale) for scale in scales)

    def _rows_at(self, level: float, run: Run, scale: float | None) -> int:
        acting = [term for term in self.with_base(scale).terms if term.acts([level])]
        more = sum(term.rows_at(level, run) for term in acting if not isinstance(term, Base))
        return 1 + any(term.contrasts for term in acting) + more

    def stock(self) -> Guidance:
        # Any scale but 1 has the pipeline predict both sides; what it makes of them is left as it is.
        return CFG(scale=2.0) if self.contrasts else NO_GUIDANCE

    def attach(self, model: Any, prompts: Sequence[str] | None = None) -> AbstractContextManager[Any]:
        """In the block, a stock pipeline guides in this way; after it, everything is as it was.

        Where the stack has a `Base` that acts, call the pipeline with guidance of its own, of any scale, so that it
        predicts the negative prompt, too. Without one, what the pipeline does by itself stays, and the stack is added
        to it.

        Args:
            model: a stock diffusers pipeline of one of the families, or a model around one.
            prompts: of the pictures that it is called for, for terms that score them by their prompts.

        Raises:
            UserError: the pipeline cannot be guided so.
        """
        pipe = getattr(model, "pipe", model)
        network = Network.of_pipeline(pipe)
        self.check(network)
        return _attach.attached(self, network, pipe, None if pipe is model else model, prompts)

    def asks_negative(self, levels: Sequence[float]) -> bool:
        """Whether a term that acts at the levels needs what is predicted for the negative prompt."""
        return any(term.contrasts and term.acts(levels) for term in self.terms)

    def combine(self, sides: Sides, point: Callable[[Term], Point], levels: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The guided prediction, and what of it the perturbations and pulls have added (0 where they do not act).

        Args:
            sides: the network's calls. point: of a term, with its memory. levels: of noise, of the rows.
        """
        canvas = self._canvas(levels)
        if canvas is None:
            return self._combined(sides, point, levels)
        at = point(canvas)
        found = []
        for i, (part, scale) in enumerate(zip(canvas.parts(sides, at), canvas.scales(at.run), strict=True)):
            inside = _within(point, part, i)
            found.append(self._combined(sides.of(part, inside), inside, levels, scale)[0])
        return canvas.blend(found, at), at.x.new_zeros(())

    def cuts(self, levels: Sequence[float]) -> bool:
        """Whether the prediction at the levels is made of those of regions."""
        return self._canvas(levels) is not None

    def _canvas(self, levels: Sequence[float]) -> Canvas | None:
        return next((term for term in self.terms if isinstance(term, Canvas) and term.acts(levels)), None)

    def with_base(self, scale: float | None) -> GuidanceStack:
        """The stack with another strength of its base, if one is given."""
        base = self.base
        if scale is None or base is None:
            return self
        return GuidanceStack([replace(term, scale=scale) if term is base else term for term in self.terms])

    def _combined(
        self, sides: Sides, point: Callable[[Term], Point], levels: Sequence[float], scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        stack, u = self.with_base(scale), None
        base = stack.base
        if stack.asks_negative(levels):
            u, c = sides.both()
        else:
            c = sides.prompt()
        p = c
        if base is not None and base.acts(levels):
            assert u is not None and self.base is not None
            p = base.combine(u, c, base.amount(levels, c), point(self.base))
        added = c.new_zeros(())
        for term in self.terms:
            if isinstance(term, Perturbed) and term.acts(levels):
                added = added + term.difference(c, sides.worse(term), term.amount(levels, c))
        # All pulls start from one prediction, so that the order in which they are listed is none.
        before = p + added
        for term in self.terms:
            if isinstance(term, Pull) and term.acts(levels):
                added = added + term.pull(before, u, term.amount(levels, c), sides, point(term))
        if added.ndim:
            p = p + added
        for term in self.terms:
            if isinstance(term, Control) and term.acts(levels):
                p = term.control(p, c, term.amount(levels, c))
        return p, added

    def side(self, term: Perturbed) -> str:
        """What the calls of a perturbation are to terms that shape the network; see `Shaping.shaping`."""
        twins = [id(other) for other in self.terms if isinstance(other, Perturbed) and other.name == term.name]
        number = twins.index(id(term)) + 1
        return term.name if number == 1 else f"{term.name} {number}"

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The terms that change latents between steps, as far as they do anything."""
        return tuple(term for term in self.terms if isinstance(term, Edit) and not term.idle)

    @property
    def shapes(self) -> tuple[Shaping, ...]:
        """The terms that shape the network, as far as they do anything."""
        return tuple(term for term in self.terms if isinstance(term, Shaping) and not term.idle)

    @property
    def feeds(self) -> tuple[Feeding, ...]:
        """The terms that add to what the network is given, as far as they do anything."""
        return tuple(term for term in self.terms if isinstance(term, Feeding) and not term.idle)

    def edited(self, x: Tensor, point: Callable[[Term], Point], level: float) -> Tensor:
        """Latents [b, ...] as they are when a step starts at a level, or the end is reached, which is at 0."""
        for term in self.edits:
            if term.acts([level]):
                x = term.edit(x, term.amount([level] * len(x), x), replace(point(term), x=x))
        return x

    def is_lost(self, levels: Sequence[float], run: Run) -> bool:
        """Whether nothing will be left of what is predicted at the levels, since an edit overwrites it."""
        after = run.after(levels[0]) if len({*levels}) == 1 else None
        if after is None:
            return False
        later = [level for level in (*run.levels, 0.0) if level <= after]
        return any(term.acts(later) and term.overwrites(levels[0]) for term in self.edits)


def guidance_of(
    model: Any, cfg_scale: float, terms: GuidanceStack | None, image_cfg_scale: float | None = None
) -> Guidance:
    """How a model is guided: by a scale, and by terms on top of it or in its place.

    Args:
        image_cfg_scale: of guidance by the picture that is edited; None for the pipeline's own.

    Raises:
        UserError: as of `GuidanceStack.over`, or the model is not guided by a picture.
    """
    own: Guidance = model.guidance(cfg_scale)
    if image_cfg_scale is not None:
        if not isinstance(own, EditCFG):
            raise UserError(
                f"image_cfg_scale guides models of InstructPix2Pix, at a cfg_scale above 1: '{model.source}' at "
                f"{cfg_scale:g} has no such guidance, leave it out"
            )
        own = replace(own, image_scale=image_cfg_scale)
    return own if terms is None else terms.over(own)


def _one_of(terms: Sequence[Term], what: str) -> None:
    if len(terms) > 1:
        raise UserError(f"{' and '.join(term.name for term in terms)} both {what}: leave one out")


def _within(point: Callable[[Term], Point], part: Part, i: int) -> Callable[[Term], Point]:
    """Points of terms in a region, where each has a memory of its own."""

    def found(term: Term) -> Point:
        at = point(term)
        run = at.run if part.prompt is None else replace(at.run, prompts=[part.prompt] * len(part.x))
        return replace(at, x=part.x, run=run, place=part.place, memory=at.memory.setdefault(f"region {i}", {}))

    return found


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
    if not isinstance(term, Base | Perturbed | Pull | Control | Canvas | Edit | Shaping | Feeding | Told):
        raise UserError(f"{path}: build of '{spec}' gives no term of a kind that visiontune.guidance.base has")
    return term
