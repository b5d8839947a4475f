"""Every numeric option of recipes, specs and methods, as tests generate values for it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from visiontune import config, plugin, schema
from visiontune.cli.show import METHODS
from visiontune.data import procedural, readers
from visiontune.diffusion.dynamics import DYNAMICS
from visiontune.ranges import Range


@dataclass(frozen=True)
class Numeric:
    """A number in the value of an option.

    Attributes:
        path: of the option or, in a section, of the section's: `timesteps.shift`.
        kind: int or float.
        limits: its bounds.
        options: the options of the whole dataclass, what is required included, of a number.
    """

    path: str
    kind: type
    limits: Range
    options: Callable[[Any], dict[str, Any]]


def owners() -> dict[str, type]:
    """Every dataclass of options by a name: what `visiontune show` prints, dynamics, and what specs hold."""
    found = config.sections()
    found |= {f"{kind}/{name}": plugin.load(kind, name).Config for kind in METHODS for name in plugin.names(kind)}
    found |= {f"dynamics/{name}": kind for name, kind in DYNAMICS.items()}
    return found | {"spec": config.RewardSpec, "procedural": procedural.Spec, "hub": readers.HubSpec}


def numeric(owner: type, path: str = "") -> Iterator[Numeric]:
    """The numbers in the options of a dataclass and of the dataclasses in it."""
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        where = f"{path}.{field.name}" if path else field.name
        for kind, wrap in _numbers(hints[field.name]):
            whole = _filled(owner, field.name, wrap)
            if kind in (int, float):
                yield Numeric(where, kind, schema.limits(field), whole)
            else:
                for inner in numeric(kind, where):
                    yield dataclasses.replace(inner, options=lambda x, a=whole, b=inner.options: a(b(x)))


def _filled(owner: type, name: str, wrap: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    fields = dataclasses.fields(owner)
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    # First what is looked at: the first that is wrong is reported.
    return lambda number: {name: wrap(number)} | {other: "x" for other in required if other != name}


def _numbers(kind: Any) -> Iterator[tuple[type, Callable[[Any], Any]]]:
    """Each type of number or dataclass in a type, and what makes a value of the type of one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in (int, float) or dataclasses.is_dataclass(kind):
        yield kind, lambda x: x
    elif origin in (list, tuple):
        count = 1 if origin is list or args[-1] is Ellipsis else len(args)
        yield from ((inner, lambda x, wrap=wrap: [wrap(x)] * count) for inner, wrap in _numbers(args[0]))
    elif origin is dict:
        yield from ((inner, lambda x, wrap=wrap: {"text": wrap(x)}) for inner, wrap in _numbers(args[1]))
    elif origin is not typing.Literal:
        for arg in args:
            yield from _numbers(arg)
