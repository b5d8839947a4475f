"""YAML as people write it: recipes, specs and the values of overrides, or one line that says what is wrong."""

from __future__ import annotations

from typing import Any

from visiontune.errors import UserError
from visiontune.outside import read_text, shown

# More than any recipe nests or holds; aliases (`&a`, `*a`) can make a short file stand for a large one.
_DEPTH = 50
_VALUES = 1_000_000


def read_yaml(path: Any) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: missing or unreadable file, invalid YAML (with line and column), an option given twice, no mapping,
            or what no option can be: see :func:`parse_yaml`.
    """
    content = parse_yaml(read_text(path), shown(str(path)))
    if not isinstance(content, dict):
        raise UserError(f"{shown(str(path))} must hold options (name: value), not {type(content).__name__}")
    return content


def parse_yaml(text: str, where: str, verbatim: bool = False) -> Any:
    """The value that ``text`` spells in YAML's safe form, with all scalars as they stand if ``verbatim``.

    Raises:
        UserError: it is no YAML, or holds a date that no calendar has, a number of thousands of digits, itself, or more
            than a recipe can; the message starts with ``where``.
    """
    import yaml

    try:
        value = yaml.load(text, Loader=_loader(yaml.BaseLoader if verbatim else yaml.SafeLoader))
        _measure(value, where, {})
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{where} is not valid YAML: {place}{shown(str(error.problem))}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {shown(' '.join(str(error).split()))}") from error
    except RecursionError as error:
        raise UserError(f"{where} nests too deep to be read") from error
    except (ValueError, OverflowError, TypeError) as error:
        # A month 13 or a number of 5,000 digits, of which PyYAML passes on what Python said.
        raise UserError(f"{where} holds a date or a number that cannot be: {shown(str(error))}") from error
    return value


def _measure(value: Any, where: str, known: dict[int, int], depth: int = 0) -> int:
    """How many values there are, aliases written out.

    Args:
        known: the sizes of the containers that were measured; 0 for those that are being measured.

    Raises:
        UserError: too many, too deep, or a container that holds itself.
    """
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) in known:
        if not known[id(value)]:
            raise UserError(f"{where} holds a value that contains itself: take the alias (*name) out")
        return known[id(value)]
    if depth > _DEPTH:
        raise UserError(f"{where} nests too deep: no option has more than {_DEPTH} levels")
    known[id(value)] = 0
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    size = 1 + sum(_measure(part, where, known, depth + 1) for part in parts)
    if size > _VALUES:
        raise UserError(f"{where} holds more than {_VALUES} values: take out aliases (*name), or use a file of data")
    known[id(value)] = size
    return size


def _loader(kind: Any) -> type:
    """One of PyYAML's safe loaders, except that a key given twice is an error: the first would silently be lost."""
    import yaml

    class Loader(kind):
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
