from __future__ import annotations

import json

import pytest

from visiontune.files import append_jsonl, atomic_write, write_json


def test_the_file_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "a.json"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".json" and temporary.parent == target.parent
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_folders_are_written_whole_too(tmp_path):
    target = tmp_path / "step-1"
    with pytest.raises(OSError), atomic_write(target) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("half")
        raise OSError
    assert list(tmp_path.iterdir()) == []
    with atomic_write(target) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("whole")
    assert (target / "weights").read_text() == "whole"


def test_json_and_lines_keep_their_content(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"é": [1, None]}
    append_jsonl(tmp_path / "new" / "a.jsonl", {"a": 1})
    append_jsonl(tmp_path / "new" / "a.jsonl", {"a": 2})
    assert [json.loads(line)["a"] for line in (tmp_path / "new" / "a.jsonl").read_text().splitlines()] == [1, 2]
