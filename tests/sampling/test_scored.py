"""Scores in the pass that draws, what is kept by them, and work in threads: the same files as without."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model

from visiontune.errors import UserError
from visiontune.evaluation.score import score
from visiontune.sampling import generate as module
from visiontune.sampling.config import KeepConfig, SampleConfig
from visiontune.sampling.generate import generate
from visiontune.sampling.overlap import Overlap
from visiontune.sampling.scored import let_go
from visiontune.schema import from_mapping
from visiontune.view import samples

FUSSY = """
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Config:
    pass

def build(config):
    def fussy(images, prompts, meta):
        if any("blue" in prompt for prompt in prompts):
            raise RuntimeError("I do not like blue")
        return images.mean((1, 2, 3))
    return fussy
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("sd")


def _config(out: Path, **options: object) -> SampleConfig:
    given = {"out": str(out), "prompts": ["a red circle", "a blue square"], "seeds": 3, "steps": 1, "batch_size": 2}
    return from_mapping(SampleConfig, {**given, "device": "cpu", **options})


def _rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def _bytes(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


def test_scores_are_those_of_the_folder(model: Any, tmp_path: Path) -> None:
    said: list[str] = []
    generate(_config(tmp_path, score=["brightness", "jpeg"]), model, said.append)
    found = score(tmp_path, ["brightness", "jpeg"])
    rows = _rows(tmp_path)
    for name in ("brightness", "jpeg"):
        np.testing.assert_allclose([row["scores"][name] for row in rows], found.values[name], rtol=1e-5)
        assert said[["brightness", "jpeg"].index(name)].startswith(f"score {name}: ")
    shown = samples.read(tmp_path)["pictures"]
    assert [one["scores"] for one in shown] == [row["scores"] for row in rows]


def test_a_reward_that_fails_on_some_pictures_loses_nothing(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fussy.py").write_text(FUSSY)
    fussy = str(tmp_path / "fussy.py")
    # Batches of two: the second holds one picture of each prompt.
    options: dict[str, Any] = {"score": [fussy, "brightness"], "keep": {"top": 1, "by": fussy}}
    generate(_config(tmp_path / "out", **options), model)
    rows = _rows(tmp_path / "out")
    assert [row["scores"][fussy] is None for row in rows] == [False] * 3 + [True] * 3
    assert all(row["scores"]["brightness"] is not None for row in rows)
    line = next(line for line in caplog.messages if "no score" in line)
    assert "for 3 pictures, which are kept: 00001_seed0.png, 00001_seed1.png, 00001_seed2.png" in line
    assert "RuntimeError: I do not like blue" in line and "\n" not in line
    assert [row["kept"] for row in rows].count(True) == 4 and all(row["kept"] for row in rows[3:])
    assert len(list((tmp_path / "out").glob("0*.png"))) == 4


def test_the_best_are_kept_and_the_others_are_known(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    generate(_config(tmp_path / "all", score=["brightness"]), model)
    generate(_config(out, score=["brightness"], keep=1), model)
    whole = _rows(tmp_path / "all")
    best = {max(whole[i : i + 3], key=lambda row: row["scores"]["brightness"])["file"] for i in (0, 3)}
    assert {path.name for path in out.glob("0*.png")} == best
    rows = _rows(out)
    assert [row["file"] for row in rows] == [row["file"] for row in whole]
    assert {row["file"] for row in rows if row["kept"]} == best
    shown = samples.read(out)
    assert {one["file"] for one in shown["pictures"]} == best and shown["missing"] == 0
    assert {item.path.name for item in score(out, ["jpeg"]).items} == best
    before = _bytes(out)
    monkeypatch.setattr("visiontune.sampling.drawing.images", lambda *_, **__: pytest.fail("sampled again"))
    generate(_config(out, score=["brightness"], keep=1), model)
    assert _bytes(out) == before
    with pytest.raises(UserError, match=r"keep was .*'top': 1.* and is .*'top': 2"):
        generate(_config(out, score=["brightness"], keep=2), model)
    # A shard holds what is kept.
    monkeypatch.undo()
    generate(_config(tmp_path / "tar", score=["brightness"], keep=1, format="tar", shard=2), model)
    assert [one["file"] for one in samples.read(tmp_path / "tar")["pictures"]] == sorted(best)
    assert [path.name for path in (tmp_path / "tar").glob("*.tar")] == ["shard-000000.tar"]


def test_a_kill_between_the_decision_and_the_end_of_it(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"score": ["brightness"], "keep": 1}
    generate(_config(tmp_path / "whole", **options), model)

    class Killed(BaseException):
        pass

    unlink, gone = Path.unlink, []

    def dying(self: Path, missing_ok: bool = False) -> None:
        if self.name.startswith("0000"):
            if gone:
                raise Killed
            gone.append(self)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(Killed):
        generate(_config(tmp_path / "out", **options), model)
    monkeypatch.undo()
    assert len(list((tmp_path / "out").glob("0*.png"))) == 5
    generate(_config(tmp_path / "out", **options), model)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def _row(file: str, index: int, score: float | None, cell: str = "") -> dict[str, Any]:
    return {"file": file, "index": index, "cell": cell, "scores": {"a": score}}


@pytest.mark.parametrize(
    ("per", "expected"),
    [("prompt", {"c", "f"}), ("cell", {"b", "f"}), ("all", {"c", "d", "f"})],
)
def test_of_what_the_best_are_kept(per: Any, expected: set[str]) -> None:
    rows = [_row("a", 0, 3.0, "x"), _row("b", 0, 1.0, "x"), _row("c", 0, 1.0, "y")]
    rows += [_row("d", 1, 2.0, "x"), _row("e", 1, None, "x"), _row("f", 1, -1.0, "x"), _row("g", 1, 9.0, "x")]
    top = {"prompt": 2, "cell": 2, "all": 2}[per]
    if per == "cell":
        top, rows = 1, [*rows[:3], *rows[5:]]
    elif per == "all":
        top, rows = 3, [*rows[:1], *rows[2:]]
        expected = {"c", "f"}
    assert let_go(rows, KeepConfig(top=top, per=per), ["a"]) == expected


def test_what_cannot_be_scored_or_kept_is_one_line(model: Any, tmp_path: Path) -> None:
    for options, message in (
        ({"keep": 1}, "keep goes by a score"),
        ({"score": ["brightness", "jpeg"], "keep": 1}, "keep.by is missing: .* one of brightness, jpeg"),
        ({"score": ["brightness"], "keep": {"top": 1, "by": "jpeg"}}, "keep.by is 'jpeg', which is not among score"),
        ({"score": ["brightness", "brightness"]}, "score names brightness twice"),
        ({"score": ["brigthness"]}, "did you mean 'brightness'"),
        ({"score": ["diversity"]}, "compares the pictures of a prompt with each other"),
    ):
        with pytest.raises(UserError, match=message):
            generate(_config(tmp_path / "out", **options), model)
    assert not list(tmp_path.rglob("*.png"))


def test_threads_change_no_byte(model: Any, tmp_path: Path) -> None:
    held = []
    for workers in (0, 1, 4):
        out = tmp_path / str(workers)
        generate(_config(out, workers=workers, score=["brightness"], seeds=4, format="webp"), model)
        held.append(_bytes(out))
    assert held[0] == held[1] == held[2]


def test_the_next_batch_is_drawn_while_one_is_written(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first picture is written only once the second batch is being drawn, which would never be without threads."""
    images, write = module.images, module.write_image
    second, begun = threading.Event(), []

    def drawn(*given: Any, **options: Any) -> np.ndarray:
        begun.append(1)
        if len(begun) == 2:
            second.set()
        return images(*given, **options)

    def written(*given: Any, **options: Any) -> str:
        assert second.wait(20)
        return write(*given, **options)

    monkeypatch.setattr("visiontune.sampling.drawing.images", drawn)
    monkeypatch.setattr(module, "write_image", written)
    generate(_config(tmp_path), model)
    assert len(begun) == 3 and len(_rows(tmp_path)) == 6


def test_batches_wait_in_bounded_number_and_in_order() -> None:
    done, drawn, most, lock = list[int](), 0, 0, threading.Lock()

    def finish(batch: int, over: Any) -> int:
        nonlocal most
        time.sleep(0.02)
        with lock:
            most = max(most, drawn - len(done))
            done.append(batch)
        return len(list(over(lambda x: x, [1, 2, 3])))

    told: list[int] = []
    with Overlap(finish, 2, told.append) as overlap:
        for batch in range(8):
            drawn += 1
            overlap.give(batch)
    assert done == list(range(8)) and told == [3] * 8
    assert most <= 4  # one is drawn, two wait or are being finished, and one was just given


def test_an_error_of_a_thread_is_the_next_calls() -> None:
    done: list[int] = []

    def finish(batch: int, over: Any) -> int:
        if batch == 1:
            raise UserError("the disk is full")
        done.append(batch)
        return 1

    drawn = 0
    with pytest.raises(UserError, match="the disk is full"), Overlap(finish, 1) as overlap:
        for batch in range(100):
            drawn += 1
            overlap.give(batch)
    assert drawn < 8 and 0 in done
    with pytest.raises(UserError, match="the disk is full"), Overlap(finish, 1) as overlap:
        overlap.give(1)  # the last one: where the block ends


def test_what_was_written_before_the_disk_was_full_is_kept(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = Image.Image.save, []

    def filling(self: Image.Image, path: Any, **options: Any) -> None:
        calls.append(path)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", filling)
    with pytest.raises(UserError, match=r"cannot be written: No space.*run the same command again"):
        generate(_config(tmp_path), model)
    monkeypatch.undo()
    assert len(_rows(tmp_path)) == 4
    generate(_config(tmp_path), model)
    assert len(_rows(tmp_path)) == 6
