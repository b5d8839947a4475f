"""What YAML can spell and no option can be is one line."""

from __future__ import annotations

import time

import pytest

from visiontune.errors import UserError
from visiontune.yaml_text import parse_yaml, read_yaml

LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(b + 1)}: &{chr(b + 1)} [{', '.join([f'*{chr(b)}'] * 9)}]\n" for b in range(ord("a"), ord("k"))
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 2024-13-45", "holds a date or a number that cannot be"),
        (f"a: {'9' * 5000}", "holds a date or a number that cannot be"),
        (f"a: {'[' * 1000}{']' * 1000}", "nests too deep"),
        (f"a: {'[' * 60}{']' * 60}", "nests too deep: no option has more than 50 levels"),
        ("a: &x [*x]", "contains itself"),
        (LAUGHS, "more than 1000000 values"),
        ("a: !!python/object:os.system x", "not valid YAML: line 1, column 4"),
        ("a: [1", "not valid YAML: line 1, column 6"),
        ("a: \x07", "not valid YAML"),
        ("? [a]\n: 1", "not valid YAML: line 1, column 3"),
        ("a: 1\na: 2", "the option 'a' is given twice"),
        ("a: *b", "not valid YAML: line 1, column 4"),
    ],
)
def test_what_cannot_be_is_one_line(text, message):
    started = time.process_time()
    with pytest.raises(UserError) as error:
        parse_yaml(text, "f.yaml")
    assert str(error.value).startswith("f.yaml ") and message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.process_time() - started < 2


def test_aliases_that_are_small_are_read():
    assert parse_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}", "f") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }


@pytest.mark.parametrize("content", ["", "3", "[1]", "text"])
def test_a_file_must_hold_options(tmp_path, content):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError, match=r"a\.yaml must hold options \(name: value\)"):
        read_yaml(tmp_path / "a.yaml")
