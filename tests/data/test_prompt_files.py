"""Prompt lists from files, and what is said of files that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from visiontune.data.prompt_files import read_prompts
from visiontune.errors import UserError


def test_text_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\ufeffa red circle\r\n  a blue\u2028star \n\n\n", encoding="utf-8")
    assert read_prompts(str(file)) == ["a red circle", "a blue\u2028star"]


def test_jsonl_takes_prompt_text_or_bare_and_allows_an_empty_prompt(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b", "id": 3}\n"c"\n{"prompt": ""}\n')
    assert read_prompts(str(file)) == ["a", "b", "c", ""]


def test_one_prompt_and_a_list() -> None:
    assert read_prompts("a red circle. And a star") == ["a red circle. And a star"]
    assert read_prompts(("x", "y")) == ["x", "y"]


def test_a_line_ends_as_any_system_ends_it(tmp_path: Path) -> None:
    (tmp_path / "P.TXT").write_bytes(b"a\rb\r\nc\n")
    assert read_prompts(str(tmp_path / "P.TXT")) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "prompt",
    [
        "~watercolour~ circle",
        "~",
        "a circle, " * 40 + "8k. sharp",
        "a\0b.c",
        "a table of sales.csv",
        "a cat.Sharp",
        "red/blue",
        "two lines\nof.txt\nwords",
    ],
)
def test_a_prompt_is_a_path_only_when_it_looks_like_one(prompt: str) -> None:
    assert read_prompts(prompt) == [prompt]


@pytest.mark.parametrize(
    "name", ["gone.txt", "gone.TXT", "my prompts.jsonl", "gone.csv", "d/list.json", "gone.Parquet"]
)
def test_the_name_of_a_file_that_is_not_there_is_no_prompt(name: str) -> None:
    with pytest.raises(UserError, match="there is no prompts file") as caught:
        read_prompts(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "", "is empty"),
        ("p.txt", " \n\n", "is empty"),
        ("p.txt", "a\n\nb\n \nc", r"empty lines \(2, 4\)"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        ("p.jsonl", '{"caption": "a"}', 'line 1 must be a text or an object with "prompt"'),
        ("p.csv", "a", r"must end in \.txt or \.jsonl"),
        ("my p.doc", "a", r"must end in \.txt or \.jsonl"),
        ("p.txt", "a\0b", "null characters"),
        ("p.jsonl", '{"prompt": "a", "n": %s}' % ("1" * 5000), "line 1 holds a number of too many digits"),
        ("p.jsonl", '{"prompt": "a"}\n"\\ud800"', "line 2 holds half of a character"),
        ("p.jsonl", "[" * 100_000, "line 1 nests too deep"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: str, words: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_prompts(str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_binary_file_and_empty_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no prompts file"):
        read_prompts(str(tmp_path / "gone.txt"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="UTF-8"):
        read_prompts(str(tmp_path / "b.txt"))
    for nothing in ([], " "):
        with pytest.raises(UserError, match="list of prompts is empty"):
            read_prompts(nothing)
