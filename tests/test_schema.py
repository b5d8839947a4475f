from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from visiontune.errors import UserError
from visiontune.schema import convert, describe, from_mapping, nearest, option


@dataclass(frozen=True, kw_only=True)
class Inner:
    SHORTHAND: ClassVar[str] = "source"
    source: str = option(help="where from")
    rate: float = option(0.1, help="a rate")

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("rate must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class OuterConfig:
    inner: Inner = option(help="a section")
    steps: int = option(10, help="how many")
    names: list[str] = option([], help="some names")
    maybe: Inner | None = option(None, help="a section or nothing")


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (float, "1e-4", 1e-4),
        (float, 3, 3.0),
        (int, "1e3", 1000),
        (int, 4.0, 4),
        (int, "1234567890123456789", 1234567890123456789),
        (str, 5, "5"),
        (bool, "no", False),
        (Path, "a/b", Path("a/b")),
        (float | None, None, None),
        (float | None, "2", 2.0),
        (str | list[str], ["a"], ["a"]),
        (int | list[int], "4", 4),
        (list[float], [1, "2e0"], [1.0, 2.0]),
        (tuple[float, float], [0, 1], (0.0, 1.0)),
        (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (dict[str, Any], {"a": [1]}, {"a": [1]}),
        (Literal["no", "bf16"], False, "no"),
        (Literal[8, 16], "16", 16),
    ],
)
def test_values_become_their_annotated_type(kind, value, expected):
    result = convert(kind, value, "x")
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, 1.5, "x must be a whole number, not 1.5"),
        (int, True, "x must be a whole number, not True"),
        (float, "fast", "x must be a number, not 'fast'"),
        (float, float, "x must be a number"),
        (bool, 1, "x must be true or false, not 1"),
        (str, True, "x must be text, not True"),
        (str, ["a"], "x must be text"),
        (list[int], "123", "x must be a list such as ['a', 'b'], not '123'"),
        (list[int], [1, "b"], "x[1] must be a whole number, not 'b'"),
        (tuple[float, float], [1], "x must be a list of 2 values"),
        (str | list[str], {"a": 1}, "x must be text or a list of texts, not {'a': 1}"),
        (Literal["cosine", "linear"], "cosin", "x cannot be 'cosin'; did you mean 'cosine'?"),
    ],
)
def test_wrong_types_are_refused_with_the_path(kind, value, message):
    with pytest.raises(UserError) as error:
        convert(kind, value, "x")
    assert str(error.value).startswith(message)


def test_nested_sections_and_shorthands():
    outer = from_mapping(OuterConfig, {"inner": "here", "maybe": {"source": "there", "rate": "5e-1"}})
    assert outer == OuterConfig(inner=Inner(source="here"), maybe=Inner(source="there", rate=0.5))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": "a", "stepz": 1}, "stepz is not an option of outer; did you mean 'steps'?"),
        ({"inner": {"source": "a", "rat": 1}}, "inner.rat is not an option of inner; did you mean 'rate'?"),
        ({"inner": {}}, "inner.source is missing: where from"),
        ({"inner": {"source": "a", "rate": -1}}, "inner: rate must be 0 or more"),
        ({"inner": "a", "maybe": {"source": "b", "rate": "x"}}, "maybe.rate must be a number, not 'x'"),
        ({"inner": "a", "maybe": {"sauce": "b"}}, "maybe.sauce is not an option of inner; did you mean 'source'?"),
        ({}, "inner is missing: a section"),
        ([], "outer must be a mapping of options, not []"),
    ],
)
def test_errors_carry_the_path_and_the_nearest_name(data, message):
    with pytest.raises(UserError) as error:
        from_mapping(OuterConfig, data)
    assert str(error.value) == message


def test_default_lists_are_not_shared():
    one, two = OuterConfig(inner=Inner(source="a")), OuterConfig(inner=Inner(source="a"))
    one.names.append("x")
    assert two.names == []


def test_nearest_lists_everything_when_nothing_is_near():
    assert nearest("lorra", ["lora", "oft"]) == "; did you mean 'lora'?"
    assert nearest("zzz", ["oft", "lora"]) == "; known: lora, oft"
    assert nearest("zzz", []) == ""


def test_describe_gives_type_default_and_help():
    rows = {name: rest for name, *rest in describe(OuterConfig)}
    assert rows["steps"] == ["a whole number", "10", "how many"]
    assert rows["inner"] == ["inner", "required", "a section"]
    assert rows["names"] == ["a list of texts", "[]", "some names"]
