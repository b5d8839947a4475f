"""Every number that a recipe can have has bounds, and nothing outside of them is taken."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import pytest
from options import numeric, owners

from visiontune.errors import UserError
from visiontune.ranges import OutOfRange, Range, argument, read_number
from visiontune.schema import convert, describe, from_mapping, limits, option

OWNERS = owners()
NEVER = ["nan", "inf", math.nan, -math.inf, "1e400", 10**400, -(10**400), "9" * 5000, True, "many", {}]


@pytest.mark.parametrize("name", OWNERS)
def test_every_numeric_option_is_bounded_on_both_sides(name):
    assert [n.path for n in numeric(OWNERS[name]) if not n.limits.bounded] == []


@pytest.mark.parametrize("name", OWNERS)
def test_defaults_are_in_range(name):
    for field in dataclasses.fields(OWNERS[name]):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                assert limits(field).admits(number), field.name


def outside(limits: Range, kind: type) -> list[float]:
    """Numbers next to each bound, but out of it."""
    step = 1 if kind is int else 1e-9
    values = [limits.least - step * max(1, abs(limits.least))] if limits.least is not None else [limits.above]
    values += [limits.greatest + step * max(1, abs(limits.greatest))] if limits.greatest is not None else [limits.below]
    return [kind(v) for v in values if math.isfinite(v)] + ([limits.multiple + 1] if limits.multiple else [])


def refusal(owner: type, options: dict) -> str:
    with pytest.raises(UserError) as error:
        from_mapping(owner, options)
    return str(error.value)


@pytest.mark.parametrize("name", OWNERS)
def test_numbers_out_of_range_are_one_line_that_names_the_option(name):
    for number in numeric(OWNERS[name]):
        infinite = math.inf in (number.limits.least, number.limits.greatest)
        wrong = [*outside(number.limits, number.kind), *([] if infinite else NEVER)]
        for value in wrong:
            message = refusal(OWNERS[name], number.options(value))
            assert message.startswith(number.path.partition(".")[0]), (number.path, value, message)
            assert "\n" not in message and len(message) < 300


@pytest.mark.parametrize("name", OWNERS)
def test_the_bounds_themselves_are_taken(name):
    for number in numeric(OWNERS[name]):
        for bound in (number.limits.least, number.limits.greatest):
            if bound is not None:
                assert number.limits.admits(number.kind(bound) if math.isfinite(bound) else bound)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    sides: list[int] = option([64], least=8, greatest=512, multiple=8, help="pixels")
    share: float | None = option(None, above=0, below=1, help="of all")
    rates: dict[str, float] = option({}, above=0, greatest=1, help="by name")
    free: int = option(0, help="without bounds")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sides": [64, 4]}, "sides[1] must be a whole number from 8 to 512 and divisible by 8, not 4"),
        ({"sides": ["65"]}, "sides[0] must be a whole number from 8 to 512 and divisible by 8, not '65'"),
        ({"share": 1}, "share must be a number above 0 and below 1, not 1"),
        ({"share": "wide"}, "share must be a number above 0 and below 1, not 'wide'"),
        ({"rates": {"text": 0}}, "rates.text must be a number above 0 and of at most 1, not 0"),
        ({"free": 2**63}, "free must be a whole number that fits 64 bits, not 9223372036854775808"),
    ],
)
def test_messages_say_the_range_and_where_the_number_stands(options, message):
    assert refusal(Config, options) == message


def test_ranges_are_shown():
    rows = {name: kind for name, kind, *_ in describe(Config)}
    assert rows == {
        "sides": "a list of whole numbers from 8 to 512 and divisible by 8",
        "share": "a number above 0 and below 1 or null",
        "rates": "a mapping of numbers above 0 and of at most 1",
        "free": "a whole number",
    }


@pytest.mark.parametrize("value", [{"a": [1, {"b": math.nan}]}, [2**63], math.inf])
def test_numbers_in_values_of_any_type_are_finite_and_of_64_bits(value):
    with pytest.raises(OutOfRange, match=r"^x.* must be a finite number of at most 64 bits"):
        convert(Any, value, "x")


def test_an_infinite_bound_admits_infinity_but_no_nan():
    limits = Range(least=0, greatest=math.inf)
    assert limits.admits(math.inf) and not limits.admits(-math.inf) and not limits.admits(math.nan)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [(int, "1e3", 1000), (int, "1.5", None), (int, 2.0, 2), (float, "0", 0.0), (int, "9" * 30, int("9" * 30))],
)
def test_numbers_are_read_exactly(kind, value, expected):
    number = read_number(kind, value)
    assert number == expected and type(number) is type(expected)


def test_the_command_line_has_ranges_too(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=argument(int, least=1, greatest=8))
    assert parser.parse_args(["--rank", "8"]).rank == 8
    for wrong in ("0", "9", "nan", "1e400", "9" * 5000, "x"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--rank", wrong])
        assert "must be a whole number from 1 to 8, not" in capsys.readouterr().err
