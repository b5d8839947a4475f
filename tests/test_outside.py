"""Files of the outside, hostile ones among them: the content, or one line."""

from __future__ import annotations

import os

import pytest

from visiontune import outside
from visiontune.errors import UserError


def test_reads_text_and_json(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"k": ["\xc3\xa9", "\\u00e9\\ud83d\\ude00"]}')
    assert outside.read_json(tmp_path / "a.json") == {"k": ["é", "é😀"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: .* line 1, column 2"),
        ("[" * 100_000, "nests too deep"),
        ("9" * 5000, "too many digits"),
        ('["\\ud800"]', "half of a character"),
        (b'["\xff"]', "not UTF-8"),
    ],
)
def test_json_that_cannot_be_used_is_one_line(text, message):
    with pytest.raises(UserError, match=f"^rows line 3 .*{message}") as error:
        outside.parse_json(text, "rows line 3")
    assert "\n" not in str(error.value)


def _pipe(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def _loop(folder):
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


def _latin(folder):
    (folder / "latin").write_bytes(b"caf\xe9")
    return folder / "latin"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none", "there is no list"),
        (lambda folder: folder, "is a folder"),
        (lambda folder: "/dev/zero", "a device"),
        (_pipe, "is a pipe"),
        (_loop, "cannot be read"),
        (_latin, "is not UTF-8"),
        (lambda folder: folder / ("k" * 3000), "cannot be read: File name too long"),
        (lambda folder: "a\0b", r"'a\\x00b' is no name of a list"),
        (lambda folder: "a\udcff", r"there is no list 'a\\udcff'"),
        (lambda folder: "~nosuchuser/x", "is no name of a list"),
    ],
)
def test_what_is_no_file_is_one_short_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as error:
        outside.read_text(make(tmp_path), "list")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    str(error.value).encode()


def test_too_large_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="has 1099511627776 bytes"):
        outside.read_text(tmp_path / "big")
