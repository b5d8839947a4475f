"""The cells of a grid: the options of each, where it stands on the axes, and what it is called."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from visiontune import files
from visiontune.errors import UserError
from visiontune.sampling.config import AXES, AdapterConfig, SampleConfig


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of the values of all axes.

    Attributes:
        config: the options that draw it, without a grid.
        name: what names of its files begin with: the letter of each axis and the place of the value in its list.
        at: the axes, and in words the values.
    """

    config: SampleConfig
    name: str
    at: dict[str, str]

    def prefix(self, text: str) -> str:
        """`text` begun with the cell's name, and with where it stands."""
        return f"grid ({', '.join(f'{axis} {word}' for axis, word in self.at.items())}): {text}" if self.at else text


def cells(config: SampleConfig) -> list[Cell]:
    """The cells of a grid, such that what costs most to change changes least often; without a grid there is one.

    Raises:
        UserError: an option is given beside the axis that takes its place.
    """
    if config.grid is None:
        return [Cell(config=config, name="", at={})]
    axes = config.grid.axes()
    for axis in axes:
        if getattr(config, axis) != _default(axis):
            raise UserError(f"{axis} is given, and grid.{axis} takes its place: put its value into that list")
    words = {axis: _words(axis, values) for axis, values in axes.items()}
    found = []
    for places in itertools.product(*(range(len(values)) for values in axes.values())):
        at = dict(zip(axes, places, strict=True))
        found.append(
            Cell(
                config=replace(config, grid=None, **{axis: axes[axis][i] for axis, i in at.items()}),
                name="".join(f"{AXES[axis]}{i}" for axis, i in at.items()),
                at={axis: words[axis][i] for axis, i in at.items()},
            )
        )
    return found


def _default(name: str) -> Any:
    field = next(field for field in fields(SampleConfig) if field.name == name)
    assert field.default is not MISSING
    return field.default


def _words(axis: str, values: Sequence[Any]) -> list[str]:
    """What the values of an axis are called, each by another name."""
    named = [_word(axis, value) for value in values]
    return [word if named.count(word) == 1 else f"{word} ({i})" for i, word in enumerate(named)]


def _word(axis: str, value: Any) -> str:
    if value is None:
        return "none"
    if axis == "model":
        return files.public_name(value)
    if axis == "pictures" and isinstance(value, str):
        return Path(value).stem
    if isinstance(value, list):
        return " + ".join(_word(axis, one) for one in value) or "none"
    if isinstance(value, AdapterConfig):
        name = Path(value.file)
        short = name.parent.name if name.name == "adapter.safetensors" and name.parent.name else name.stem
        return short if value.scale == 1 else f"{short} {value.scale:g}"
    if axis == "adapter":
        return _word(axis, AdapterConfig(file=value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(options)}".strip() for name, options in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace('"', "") if isinstance(value, dict | list) else str(value)
