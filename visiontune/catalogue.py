"""The catalogue: recipes, reward specs and data-set specs, in a checkout's root folders or inside the wheel.

An entry's name is its path without the suffix: ``personalise/oft`` is ``pipelines/personalise/oft.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visiontune.errors import UserError
from visiontune.schema import nearest

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
    """All entries of a kind (``pipelines``, ``rewards`` or ``datasets``), sorted."""
    folder = root() / kind
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def find(kind: str, name: str) -> Path:
    """The file of a catalogue entry.

    Raises:
        UserError: there is no such entry.
    """
    if name not in names(kind):
        raise UserError(f"'{name}' is not {_NOUNS[kind]}{nearest(name, names(kind))}")
    return root() / kind / f"{name}.yaml"


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
    path = Path(path)
    while True:
        if path.resolve() in seen:
            raise UserError(f"{path} extends itself: take `extends` out of one of {', '.join(p.name for p in seen)}")
        seen.append(path.resolve())
        content = read_yaml(path)
        below = content.pop("extends", None)
        layers.append(content)
        if below is None:
            break
        path = path.parent / str(below) if str(below).endswith((".yaml", ".yml")) else find("pipelines", str(below))
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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: missing or unreadable file, invalid YAML (with line and column), an option given twice, no mapping.
    """
    import yaml

    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{path} is not valid YAML: {where}{error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold options (name: value), not {type(content).__name__}")
    return content


def _loader() -> type:
    """PyYAML's safe loader, except that a key given twice is an error: the first would silently be lost."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                name = str(key.value)
                if name in seen:
                    problem = f"the option '{name}' is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    return Loader
