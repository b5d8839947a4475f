"""Adapters in the formats of other tools; each is a file of :mod:`visiontune.weights.formats`.

LoRA goes over as it is, its strength folded into the second factor, and DoRA with the lengths of its rows. Where a
format has factors alone, any other method, and DoRA where a rank is given, is the best approximation of that rank. How
far what is written, rounded as it is, lies from the change is returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.adapters import AdapterSet
from visiontune.errors import UserError
from visiontune.weights import formats
from visiontune.weights._sets import Changes
from visiontune.weights.keys import Keys


@dataclass(frozen=True, kw_only=True)
class Job:
    """How to write.

    Attributes:
        dtype: of the written tensors.
        rank: of the approximation of what is no LoRA; none for as many as the change really has.
        keys: what other tools call the model's layers.
        model: the one that the sets are attached to: whole models are written from it, and a file of adapters is held
            against what its pipeline loads.
        component: the only one that is written, in a format that holds one.
        metadata: what the header of a file says beside ``format``.
    """

    dtype: torch.dtype
    rank: int | None = None
    keys: Keys = field(default_factory=Keys)
    model: Any = None
    component: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def root(self) -> nn.Module | None:
        """The module that has all networks of the model as its children, if it is one."""
        found: nn.Module | None = getattr(self.model, "root", None)
        return found


@dataclass
class Exported:
    """What was written.

    Attributes:
        path: the file or folder. what: in words.
        ranks: rank of each layer, none where there are no factors.
        errors: for each layer, the Frobenius norm of the difference between what was written and the change, relative
            to the change.
        dora: whether lengths of rows were written beside the factors.
        notes: what the user has to know of its readers, a line each.
    """

    path: Path
    what: str
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    dora: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest error of a layer."""
        return max(self.errors.values(), default=0.0)

    def text(self) -> str:
        """One line on what was written and how far it is from the change."""
        ranks = f", ranks {min(self.ranks.values())} to {max(self.ranks.values())}" if self.ranks else ""
        loss = f", off by {self.worst:.2%} of a layer's change at most" if self.errors else ""
        return f"{self.path}, {self.what}{ranks}{loss}"


@torch.no_grad()
def export(
    adapters: AdapterSet | Sequence[AdapterSet],
    path: str | Path,
    kind: str = "diffusers",
    *,
    dtype: torch.dtype,
    rank: int | None = None,
    keys: Keys | None = None,
    model: Any = None,
    component: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write a set's change of its base, or what several make of it together, for another tool.

    Args:
        adapters: attached sets, not merged; written at their present ``scale``.
        path: a ``.safetensors`` file or a folder, as the format has it; it is whole or absent.
        kind: the format.
        dtype, rank, model, component, metadata: see :class:`Job`; ``merged`` needs ``model``, and leaves it cast and
            merged.
        keys: the model's, see :func:`visiontune.weights.keys.keys_of`; by default the names of diffusers and PEFT,
            without which ``kohya`` and ``diff`` cannot be written.

    Raises:
        UserError: unknown format, a merged or disabled set, or what the format cannot hold, with the formats that can.
    """
    from visiontune.weights import words

    writer = formats.load(kind)
    sets = [adapters] if isinstance(adapters, AdapterSet) else list(adapters)
    for found in sets:
        if not found.active:
            raise UserError(f"adapter '{found.name}' is merged or disabled: unmerge or enable it before the export")
    changes = Changes(sets)
    if kind != "merged" and (whole := [name for found in sets for name in found.wholes()]):
        raise UserError(f"{kind} has no place for '{whole[0]}', a layer that the base does not have: export as merged")
    job = Job(
        dtype=dtype, rank=rank, keys=keys or Keys(), model=model, component=component, metadata=dict(metadata or {})
    )
    try:
        _check(kind, changes, job)
    except UserError as error:
        raise UserError(f"{error}: {_mend(changes, job)}") from error
    found = {} if kind == "merged" else changes.words()
    words.check(found)
    at = words.places(found, Path(path))
    if found and not changes.layers:
        done = Exported(path=next(iter(at.values())), what="a word alone: no weight is changed")
    else:
        done = writer.write(changes, Path(path), job)
    done.notes += words.write(found, at, dtype)
    done.notes += [
        f"other tools do not know of model.skips={kappa:g} and draw other pictures; visiontune does"
        for kappa in sorted({one.skips for one in sets} - {1.0})
    ]
    return done


def _mend(changes: Changes, job: Job) -> str:
    """What can be done about changes that a format does not hold: the formats that do."""
    able = [name for name in formats.names() if _holds(name, changes, job)]
    if able:
        *first, last = able
        return f"export as {', '.join(first)} or {last}" if first else f"export as {last}"
    return (
        "no other format can either, so only visiontune can use it (visiontune sample); to export, train other targets"
    )


def _check(kind: str, changes: Changes, job: Job) -> None:
    """What the format asks, and that there is a change at all: some methods make another weight for each sample."""
    formats.load(kind).check(changes, job)
    for layer in [*changes.layers][:1]:
        changes.change(layer)


def _holds(kind: str, changes: Changes, job: Job) -> bool:
    try:
        _check(kind, changes, job)
    except UserError:
        return False
    return True


def check_biases(changes: Changes) -> None:
    """Refuse biases of layers that have none in the base, which readers of the base's layout would leave out.

    Raises:
        UserError: naming the first such layer.
    """
    for layer in changes.layers:
        if getattr(changes.layer(layer), "bias", None) is None and changes.moves_bias(layer):
            raise UserError(f"'{layer}' got a bias that the base's layer does not have")


def off_by(written: Tensor, wanted: Tensor, change: Tensor) -> float:
    """How far ``written`` is from ``wanted``, relative to the ``change`` that was to be written; 0 without one."""
    size = float(change.double().norm())
    return float((written.double() - wanted.double()).norm()) / size if size else 0.0


def rounded(dtype: torch.dtype, worst: float) -> list[str]:
    """A note where the number format alone takes more of a layer's change than can be seen."""
    if worst < 0.01:
        return []
    name = str(dtype).removeprefix("torch.")
    return [
        f"{name} is too coarse for this adapter: it moves a layer by {worst:.1%} of its change; --dtype fp32 is not"
    ]
