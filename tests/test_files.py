from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from visiontune import files
from visiontune.errors import UserError
from visiontune.files import Lock, append_jsonl, atomic_write, write_json
from visiontune.outside import shown


def test_the_file_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "a.json"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert temporary.name == target.name and temporary.parent.parent == target.parent
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


def holder(folder):
    """Another process that has the folder."""
    code = (
        f"from visiontune.files import Lock; lock = Lock({str(folder)!r}); lock.hold(); print(1, flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    return process


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_a_folder_has_one_writer_until_that_ends_however_it_ends(tmp_path, end):
    other, mine = holder(tmp_path), Lock(tmp_path)
    with pytest.raises(UserError, match=f"being written to by process {other.pid} on"):
        mine.hold()
    if end is None:
        other.communicate("\n", timeout=60)
    else:
        other.send_signal(end)
        other.wait(60)
        assert (tmp_path / ".lock").exists()  # what is left of it is no obstacle
    mine.hold()
    mine.hold()
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        Lock(tmp_path).hold()
    mine.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_leaves_no_folder_in_which_nothing_was_written(tmp_path):
    lock = Lock(tmp_path / "a" / "b")
    lock.hold()
    lock.release()
    assert not list(tmp_path.iterdir())
    lock.hold()
    (tmp_path / "a" / "b" / "kept").touch()
    lock.release()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_a_lock_file_that_its_holder_took_away_is_not_what_the_next_one_has(tmp_path, monkeypatch):
    """Between opening the file and locking it, the holder ends: the file that is locked then is no longer there."""
    first, second, flock = Lock(tmp_path), Lock(tmp_path), files.fcntl.flock
    first.hold()

    def late(file, how):
        first.release()
        return flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    second.hold()
    monkeypatch.undo()
    with pytest.raises(UserError):
        Lock(tmp_path).hold()


def test_a_file_system_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="cannot be locked here"):
        Lock(tmp_path).hold()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_new_ones_whoever_writes_them(tmp_path, mask, mode):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "a.safetensors") as temporary:
            save_file({}, temporary)
        with atomic_write(tmp_path / "folder") as temporary:
            (temporary / "deeper").mkdir(parents=True)
            save_file({}, temporary / "deeper" / "a.safetensors")
        files.write_text(tmp_path / "a.txt", "text")
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(written) == 3 and {path.stat().st_mode & 0o777 for path in written} == {mode}
        assert os.umask(mask) == mask
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["../a.png", "b/../../a.png", "/etc/passwd", ".."])
def test_a_list_names_files_of_its_own_folder(tmp_path, name):
    with pytest.raises(UserError, match=r"line 3 names '.*', which is outside of"):
        files.inside(tmp_path, name, "line 3")
    assert files.inside(tmp_path, "b/..a.png", "line 3") == tmp_path / "b" / "..a.png"


def _png(path):
    Image.effect_noise((64, 64), 50).save(path, format="PNG")


WRITERS = {
    "text": lambda path: files.write_text(path, "x" * 9000),
    "json": lambda path: write_json(path, ["x"] * 9000),
    "lines": lambda path: append_jsonl(path, {"x": "x" * 9000}),
    "tensors": lambda path: _atomic(path, lambda temporary: save_file({"a": torch.zeros(9000)}, temporary)),
    "picture": lambda path: _atomic(path, _png),
    "folder": lambda path: _atomic(path, lambda temporary: [temporary.mkdir(), _png(temporary / "a.png")]),
    "lock": lambda path: Lock(path).hold(),
}


def _atomic(path, write):
    with atomic_write(path) as temporary:
        write(temporary)


def _link_to_itself(folder):
    (folder / "loop").symlink_to("loop")
    return folder / "loop" / "a.json"


def _file_for_a_folder(folder):
    (folder / "f").write_text("mine")
    return folder / "f" / "a.json"


def _folder_in_the_way(folder):
    (folder / "d.json" / "mine").mkdir(parents=True)
    return folder / "d.json"


PLACES = {
    "link to itself": (_link_to_itself, ""),
    "file for a folder": (_file_for_a_folder, ""),
    "folder in the way": (_folder_in_the_way, "move away what lies there"),
    "long name": (lambda folder: folder / ("k" * 3000) / "a.json", "File name too long"),
    "proc": (lambda folder: Path("/proc/nowhere/a.json"), ""),
    "null byte": (lambda folder: folder / "a\0b", "(null byte|Invalid argument)"),
    "half a character": (lambda folder: folder / "a\ud800", "half of a character"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_is_one_line_and_stays_as_it_was(tmp_path, writer, place):
    if (writer, place) == ("lock", "folder in the way"):
        pytest.skip("which is what it locks")
    make, words = PLACES[place]
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"cannot be written: .*{words}") as error:
        WRITERS[writer](path)
    assert shown(str(path)) in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "lock"])
def test_a_limit_of_the_size_of_files_is_one_line_and_leaves_what_was_there(tmp_path, writer):
    code = (
        f"import resource, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_files\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "from visiontune.errors import UserError\n"
        f"try: test_files.WRITERS[{writer!r}](test_files.Path({str(tmp_path / 'a.json')!r}))\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a.json cannot be written: File too large" in done.stdout, done.stderr
    assert writer == "lines" or not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_errors_of_the_system_and_of_libraries_say_the_mend(tmp_path, number):
    for raised in (OSError(number, os.strerror(number)), SafetensorError(f"I/O error: no (os error {number})")):
        with pytest.raises(UserError, match=f"a.bin cannot be written: {os.strerror(number)}: .{{9,}}"):
            _atomic(tmp_path / "a.bin", raises(raised))
    with pytest.raises(FileNotFoundError):  # what is read is not what is written
        _atomic(tmp_path / "a.bin", lambda _: (tmp_path / "other" / "input").read_text())


def raises(error):
    def write(_):
        raise error

    return write


def test_a_target_is_checked_before_there_is_anything_to_write(tmp_path):
    for place in ("folder in the way", "file for a folder", "long name", "null byte"):
        with pytest.raises(UserError, match=r"cannot be|is no name|is a file|has a name of"):
            files.check_target(PLACES[place][0](tmp_path))
    files.check_target(tmp_path / "new" / "deep" / "a.json")
    assert not (tmp_path / "new").exists()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match="exists"):
        files.check_new(tmp_path / "dangling")


def test_what_a_shared_folder_was_left_with_half_written_goes_once_it_is_old(tmp_path):
    old, new = tmp_path / "ab" / ".ab12.77.tmp.safetensors", tmp_path / "cd" / ".cd34.78.tmp.safetensors"
    others = [tmp_path / "ab" / name for name in ("ab12.safetensors", ".hidden", ".mine.tmp", "x.77.tmp.png")]
    for path in (old, new):
        path.mkdir(parents=True)
        (path / "part").write_text("half")
    for path in others:
        path.write_text("whole")
    for path in (old, *others):
        os.utime(path, (0, 0))
    files.clear_abandoned(tmp_path)
    assert not old.exists() and new.is_dir() and all(path.read_text() == "whole" for path in others)
    files.clear_abandoned(tmp_path / "none")
