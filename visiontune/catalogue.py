"""The catalogue: recipes, reward specs and data-set specs, in a checkout's root folders or inside the wheel.

An entry's name is its path without the suffix: ``personalise/oft`` is ``pipelines/personalise/oft.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visiontune.errors import UserError
from visiontune.outside import regular
from visiontune.schema import nearest
from visiontune.yaml_text import read_yaml

KINDS = ("pipelines", "rewards", "datasets")
_NOUNS = {"pipelines": "a recipe of the catalogue", "rewards": "a reward spec", "datasets": "a catalogue dataset"}
_PACKAGE = Path(__file__).parent


def root() -> Path:
    """The folder that holds the catalogue folders: the checkout that this package lies in, or the wheel's copy."""
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "pipelines").is_dir():
        return checkout
    return _PACKAGE / "_catalogue"


def names(kind: str) -> list[str]:
    """All entries of a kind (``pipelines``, ``rewards`` or ``datasets``), sorted.

    A name with a leading underscore is what others have in common: to be extended, and not listed.
    """
    folder = root() / kind
    files = (file for file in folder.rglob("*.yaml") if not file.name.startswith("_"))
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)


def find(kind: str, name: str) -> Path:
    """The file of a catalogue entry.

    Raises:
        UserError: there is no such entry.
    """
    folder = root() / kind
    common = {file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("_*.yaml")}
    if name not in {*names(kind), *common}:
        raise UserError(f"'{name}' is not {_NOUNS[kind]}{nearest(name, names(kind))}")
    return folder / f"{name}.yaml"


def load(kind: str, name: str) -> dict[str, Any]:
    """The content of a catalogue entry."""
    path = find(kind, name)
    return read_recipe(path) if kind == "pipelines" else read_yaml(path)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The content of a recipe, put on top of the recipe that it ``extends``.

    That is another's catalogue name, or its path from this one's folder. Sections are merged option by option; one that
    names another method takes none of the options of the first.

    Raises:
        UserError: as for :func:`read_yaml`, or recipes that extend each other.
    """
    layers, seen = [], list[Path]()
    path = regular(path, "recipe")
    while True:
        if path.resolve() in seen:
            raise UserError(f"{path} extends itself: take `extends` out of one of {', '.join(p.name for p in seen)}")
        seen.append(path.resolve())
        content = read_yaml(path)
        below = content.pop("extends", None)
        layers.append(content)
        if below is None:
            break
        if not isinstance(below, str):
            raise UserError(f"{path} extends no recipe: name one, or a .yaml file, by `extends`")
        path = path.parent / below if below.endswith((".yaml", ".yml")) else find("pipelines", below)
        path = regular(path, "recipe")
    whole: dict[str, Any] = {}
    for content in reversed(layers):
        whole = _put_on(whole, content)
    return whole


def _put_on(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = value
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name") in (None, old.get("name")):
            merged[key] = _put_on(old, value)
    return merged
