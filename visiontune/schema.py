"""Typed options: plain mappings (YAML, command line) become frozen dataclasses, or one readable error.

A configuration is a ``@dataclass(frozen=True, kw_only=True)`` whose fields are made with :func:`option`. A dataclass
may name in the class variable ``SHORTHAND`` the field that a bare value stands for (``model: pocket/sd``), and in
``RENAMED`` what options that it once had are called now.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from visiontune.errors import UserError
from visiontune.ranges import OutOfRange, Range, read_number
from visiontune.yaml_text import parse_yaml

T = TypeVar("T")

# What a pair of brackets stands for in words: `[trigger]` is text wherever text is taken, and no list.
SLOTS = ("trigger", "class")
_LONGEST = 10.0**50
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def option(
    default: Any = MISSING,
    *,
    help: str,
    least: float | None = None,
    greatest: float | None = None,
    above: float | None = None,
    below: float | None = None,
    multiple: int | None = None,
) -> Any:
    """A dataclass field with a help text; without a default it is required. Lists and dicts are copied per instance.

    The bounds (see :class:`visiontune.ranges.Range`) hold for every number of the value, in lists and mappings too.
    """
    limits = Range(least=least, greatest=greatest, above=above, below=below, multiple=multiple)
    metadata = {"help": help, "range": limits}
    if isinstance(default, (list, dict, set)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of an error message about ``word``: its nearest match among ``choices``, or all of them."""
    known = sorted(map(str, choices))
    close = difflib.get_close_matches(str(word), known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


def from_mapping(cls: type[T], data: Any, path: str = "") -> T:
    """Build the dataclass ``cls`` from ``data``, checking names, types and the ranges of numbers recursively.

    Text is read as a number where a number is expected (YAML reads ``1e-4`` as text), and as a list or a mapping where
    one is (see :func:`structure`). A ``ValueError`` or :class:`UserError` of the dataclass's own ``__post_init__`` is
    reported with the path. A name in ``RENAMED`` is refused with today's; one that is an option again, of no number, is
    so where a number stands for it.

    Args:
        cls: the dataclass.
        data: a mapping of its options, or the bare value of its ``SHORTHAND`` field.
        path: where ``data`` stands in the document, ``"train"`` for instance; empty for the whole document.

    Raises:
        UserError: unknown or missing option, wrong type, a number out of its range; the message starts with the path.
    """
    data = structure(data)
    shorthand = getattr(cls, "SHORTHAND", None)
    if shorthand and not isinstance(data, Mapping):
        data = {shorthand: data}
    if not isinstance(data, Mapping):
        raise UserError(f"{path or label(cls)} must be a mapping of options, not {shown(data)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    renamed = getattr(cls, "RENAMED", {})
    for key in data:
        if key in renamed and (key not in fields or read_number(float, data[key]) is not None):
            raise UserError(f"{_join(path, key)} is now {_join(path, renamed[key])}")
        if key not in fields:
            raise UserError(f"{_join(path, key)} is not an option of {label(cls)}{nearest(_join('', key), fields)}")
    for name, field in fields.items():
        if name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{_join(path, name)} is missing: {field.metadata.get('help', 'it has no default')}")
    hints = _hints(cls)
    values = {key: convert(hints[key], value, _join(path, key), limits(fields[key])) for key, value in data.items()}
    try:
        return cls(**values)
    except (ValueError, UserError) as error:
        where = path or label(cls)
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


# Annotations are texts, and each is compiled anew whenever it is asked for.
_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def limits(field: dataclasses.Field[Any]) -> Range:
    """The bounds of a field's numbers; a field that :func:`option` did not make has none."""
    return field.metadata.get("range", Range())


def convert(kind: Any, value: Any, path: str, within: Range = Range()) -> Any:  # noqa: B008 (it is frozen)
    """``value`` as the annotated type ``kind``, its numbers ``within`` bounds; ``path`` names it in errors."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        _check_free(value, path)
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path, within)
    if origin is Literal:
        return _convert_literal(args, value, path)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else from_mapping(kind, value, path)
    container = origin or kind
    value = structure(value, kind)
    if isinstance(container, type) and container is not str:
        if issubclass(container, Mapping):
            return _convert_mapping(args, value, path, within)
        if issubclass(container, (list, tuple)) or container.__name__ == "Sequence":
            return _convert_sequence(container, args, value, path, within)
    return _convert_scalar(kind, value, path, within)


def _check_free(value: Any, path: str) -> None:
    """Numbers and texts in what has no type of its own: what no option can have is no part of one either."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_free(key, f"the key {shown(key)} of {path}")
            _check_free(item, _join(path, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_free(item, f"{path}[{i}]")
    elif isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, (int, float)) and not Range().admits(value):
        raise OutOfRange(f"{path} must be a finite number of at most 64 bits, not {shown(value)}")


def _check_text(text: str, path: str) -> None:
    if "\0" in text:
        raise UserError(f"{path} holds a null character: take it out of {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} is not UTF-8 text, see {shown(text)}: write the character itself") from error


def _convert_union(kinds: tuple[Any, ...], value: Any, path: str, within: Range) -> Any:
    if type(None) in kinds and (value is None or value == ""):
        return None
    rest = [k for k in kinds if k is not type(None)]
    for kind in rest:
        value = structure(value, kind, text=str in rest)
    exact = [k for k in rest if type(value) is (typing.get_origin(k) or k)]
    if isinstance(value, Mapping):
        exact += [k for k in rest if dataclasses.is_dataclass(k)]
    errors = []
    for kind in [*exact, *(k for k in rest if k not in exact)]:
        try:
            return convert(kind, value, path, within)
        except OutOfRange:
            raise
        except UserError as error:
            errors.append(error)
    # A nested error (a longer path) says more than "must be one of these types".
    if len(rest) == 1 or exact or not str(errors[0]).startswith(f"{path} "):
        raise errors[0]
    raise UserError(f"{path} must be {type_name(Union[kinds], within)}, not {shown(value)}")  # noqa: UP007


def structure(value: Any, kind: Any = dict, text: bool = False) -> Any:
    """The list or mapping that a text spells in YAML's ``[a, b]`` or ``{a: b}``, where ``kind`` is one; else ``value``.

    Args:
        value: anything; only text is read.
        kind: the annotated type. Items of type ``str`` are texts as they stand, ``no`` and ``1`` too.
        text: whether the text itself would do too. Then a list must be one of texts, and ``[trigger]`` is none.
    """
    if not isinstance(value, str):
        return value
    container, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    mapping = dataclasses.is_dataclass(kind) or (isinstance(container, type) and issubclass(container, Mapping))
    sequence = isinstance(container, type) and issubclass(container, (list, tuple))
    if not value.lstrip().startswith("{" if mapping else "[") or not (mapping or sequence):
        return value
    found = _yaml(value, verbatim=args[-1:] == (str,))
    if not isinstance(found, dict if mapping else list):
        return value
    words = value.strip().strip("[]").lower() in SLOTS or not all(isinstance(item, str) for item in found)
    return value if text and sequence and words else found


def spelt(value: Any) -> Any:
    """What a text spells where no type says it: a number, true or false, null, a list or mapping; else ``value``."""
    if not isinstance(value, str):
        return value
    number = read_number(int, value)
    number = read_number(float, value) if number is None else number
    return _yaml(value) if number is None else number


def _yaml(text: str, verbatim: bool = False) -> Any:
    """What YAML reads in a text, with all scalars as they stand if ``verbatim``; the text where it is no YAML."""
    try:
        return parse_yaml(text, "this", verbatim)
    except UserError:
        return text


def _convert_literal(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    # YAML 1.1 reads a bare no/off as false: choices such as precision "no" must survive that.
    if isinstance(value, bool):
        for word in ("no", "off", "false") if value is False else ("yes", "on", "true"):
            if word in choices:
                return word
    written = value if isinstance(value, str) else shown(value)
    for choice in choices:
        if str(choice) == written:
            return choice
    raise UserError(f"{path} cannot be {shown(value)}{nearest(written, map(str, choices))}")


def _convert_mapping(args: tuple[Any, ...], value: Any, path: str, within: Range) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{path} must be a mapping, not {shown(value)}")
    key_kind, kind = args if len(args) == 2 else (Any, Any)
    named = {convert(key_kind, key, f"the key {shown(key)} of {path}"): item for key, item in value.items()}
    return {key: convert(kind, item, _join(path, key), within) for key, item in named.items()}


def _convert_sequence(
    container: type, args: tuple[Any, ...], value: Any, path: str, within: Range
) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{path} must be a list such as ['a', 'b'], not {shown(value)}")
    fixed = container is tuple and args and args[-1] is not Ellipsis
    if fixed and len(args) != len(value):
        raise UserError(f"{path} must be a list of {len(args)} values, not {shown(value)}")
    kinds = args if fixed else [args[0] if args else Any] * len(value)
    items = [
        convert(kind, item, f"{path}[{i}]", within) for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    ]
    return tuple(items) if container is tuple else items


def _convert_scalar(kind: Any, value: Any, path: str, within: Range) -> Any:
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        # A number of thousands of digits has no text, and stays one, which is refused.
        value = str(value) if abs(value) < _LONGEST else value
    if kind is bool and isinstance(value, str):
        value = _BOOLEANS.get(value.lower(), value)
    if isinstance(value, str) and kind in (str, Path):
        _check_text(value, path)
        return kind(value)
    if kind in (int, float):
        number = read_number(kind, value)
        if number is not None and within.admits(number):
            return number
        if number is not None:
            raise OutOfRange(f"{path} must be {_allowed(kind, within)}, not {shown(value)}")
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise UserError(f"{path} must be {type_name(kind, within)}, not {shown(value)}")


def _allowed(kind: type, within: Range) -> str:
    words = type_name(kind, within)
    if within.bounded:
        return words
    return f"{words} that fits 64 bits" if kind is int else words.replace("a number", "a finite number")


def describe(cls: type) -> list[tuple[str, str, str, str]]:
    """One row ``(name, type and range, default, help)`` for each option of a dataclass; ``required`` has no default."""
    hints, rows = _hints(cls), []
    for field in dataclasses.fields(cls):
        value = field.default if field.default_factory is MISSING else field.default_factory()
        default = "required" if value is MISSING else _written(value)
        kind = type_name(hints[field.name], limits(field))
        rows.append((field.name, kind, default, field.metadata.get("help", "")))
    return rows


def _written(value: Any) -> str:
    """A default as one would write it in a recipe."""
    if dataclasses.is_dataclass(value):
        return "its own defaults"
    return value or "''" if isinstance(value, str) else json.dumps(value, default=str)


def type_name(kind: Any, within: Range = Range()) -> str:  # noqa: B008 (it is frozen)
    """A type in a reader's words, with the bounds of its numbers."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    words = {str: "text", int: f"a whole number{within.text()}", float: f"a number{within.text()}"}
    words |= {bool: "true or false", type(None): "null", Path: "a path", Any: "anything"}
    if kind in words:
        return words[kind]
    if origin is Literal:
        return f"'{args[0]}'" if len(args) == 1 else "one of " + ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a, within) for a in args)
    if origin and isinstance(origin, type) and issubclass(origin, Mapping):
        numbers = f" of numbers{within.text()}" if args[1:] and args[1] in (int, float) else ""
        return f"a mapping{numbers}"
    if origin:
        plurals = {int: f"whole numbers{within.text()}", float: f"numbers{within.text()}", str: "texts"}
        fixed = origin is tuple and args[-1] is not Ellipsis
        return f"a list of {f'{len(args)} ' if fixed else ''}{plurals.get(args[0], type_name(args[0], within))}"
    return label(kind) if dataclasses.is_dataclass(kind) else getattr(kind, "__name__", str(kind))


def label(cls: Any) -> str:
    """What a configuration class is called in messages: a plug-in's file name, or ``train`` for ``TrainConfig``."""
    if cls.__name__ == "Config":
        return cls.__module__.removesuffix(".base").rpartition(".")[2]
    return cls.__name__.removesuffix("Config").lower()


def _join(path: str, key: Any) -> str:
    name = key if isinstance(key, str) else shown(key)
    return f"{path}.{name}" if path else name


def shown(value: Any) -> str:
    """``value`` as an error message may show it."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
