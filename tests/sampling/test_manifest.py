"""The manifest survives kills, joins parts, and refuses another run's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from visiontune.errors import UserError
from visiontune.evaluation import score
from visiontune.sampling import manifest
from visiontune.sampling.cells import Cell
from visiontune.sampling.config import SampleConfig

SETTINGS = {"steps": 2, "cfg_scale": 4.0}
CELLS = [(Cell(config=SampleConfig(prompts="a"), name="", at={}), SETTINGS)]
JOBS = manifest.plan(["a", "b"], [0, 7], "png")


def _row(job: manifest.Job, **settings: object) -> dict:
    fields = {"file": job.file, "index": job.index, "prompt": job.prompt, "seed": job.seed}
    return {**fields, "settings": {**SETTINGS, **settings}}


def _write(path: Path, rows: list[dict], end: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    for row in rows:
        (path.parent / row["file"]).touch()


def test_plan_is_every_prompt_with_every_seed() -> None:
    assert [job.file for job in JOBS] == ["00000_seed0.png", "00000_seed7.png", "00001_seed0.png", "00001_seed7.png"]
    assert [(job.index, job.prompt, job.seed) for job in JOBS[1:3]] == [(0, "a", 7), (1, "b", 0)]


def test_collect_heals_a_cut_line_joins_parts_and_removes_leftovers(tmp_path: Path) -> None:
    _write(tmp_path / "manifest.jsonl", [_row(JOBS[2])], end='{"file": "00001_se')
    _write(tmp_path / "manifest.rank1.jsonl", [_row(JOBS[1]), _row(JOBS[2])])
    (tmp_path / ".00001_seed7.99.tmp.png").touch()
    (tmp_path / ".mine.tmp.png").touch()
    rows = manifest.collect(tmp_path)
    assert [row["file"] for row in rows] == [JOBS[1].file, JOBS[2].file]
    assert [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()] == rows
    assert sorted(p.name for p in tmp_path.glob("manifest*")) == ["manifest.jsonl"]
    assert [p.name for p in tmp_path.glob(".*")] == [".mine.tmp.png"]


def test_collect_forgets_rows_whose_image_is_gone(tmp_path: Path) -> None:
    _write(tmp_path / "manifest.jsonl", [_row(JOBS[0]), _row(JOBS[1])])
    (tmp_path / JOBS[0].file).unlink()
    assert [row["file"] for row in manifest.collect(tmp_path)] == [JOBS[1].file]


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    for damage in ('{"file": "0', "[1]", '{"prompt": "no file"}'):
        path.write_text(f"{damage}\n{json.dumps(_row(JOBS[0]))}\n")
        with pytest.raises(UserError, match=r"line 1 .*delete that line"):
            manifest.read(path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname"])
def test_a_row_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").touch()
    folder = tmp_path / "drawn"
    folder.mkdir()
    (folder / manifest.NAME).write_text(json.dumps({"file": name, "prompt": "a"}) + "\n")
    for read in (lambda: manifest.collect(folder), lambda: score.read_folder(folder)):
        with pytest.raises(UserError, match=f"line 1 names '{name}', which is outside of"):
            read()


def test_changed_settings_are_named_with_both_values(tmp_path: Path) -> None:
    rows = [_row(JOBS[0], steps=5, cfg_scale=7.0, old=1)]
    with pytest.raises(UserError) as caught:
        manifest.check(rows, JOBS, CELLS, tmp_path)
    for words in ("steps was 5 and is 2", "cfg_scale was 7.0 and is 4.0", "old was 1 and is None"):
        assert words in str(caught.value)


def test_lists_may_grow_but_not_change(tmp_path: Path) -> None:
    rows = [_row(job) for job in JOBS]
    manifest.check(rows, manifest.plan(["a", "b", "c"], [3, 0, 7], "png"), CELLS, tmp_path)
    cases = [(["a"], [0, 7], r"prompts\[1\] was 'b' and is gone"), (["a", "x"], [0, 7], "was 'b' and is 'x'")]
    for prompts, seeds, words in [*cases, (["a", "b"], [0], "seeds held 7")]:
        with pytest.raises(UserError, match=words):
            manifest.check(rows, manifest.plan(prompts, seeds, "png"), CELLS, tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {"file": 5},
        {"file": ["a"]},
        {"file": None},
        {"file": "a\0b"},
        {"prompt": None},
        {"prompt": 5},
        {"index": "x"},
        {"seed": []},
        {"threads": "4"},
        {"settings": 5},
        "[" * 100_000,
        '{"file": "\\ud800", "prompt": ""}',
        "9" * 5000,
        "null",
    ],
    ids=lambda row: str(row)[:30],
)
def test_a_row_of_another_shape_is_one_line(tmp_path: Path, row: dict[str, Any] | str) -> None:
    path = tmp_path / manifest.NAME
    text = row if isinstance(row, str) else json.dumps({**_row(JOBS[0]), **row})
    path.write_text(f"{text}\n{json.dumps(_row(JOBS[1]))}\n")
    with pytest.raises(UserError, match=r"line 1 .*delete that line") as error:
        manifest.collect(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / manifest.NAME)
    with pytest.raises(UserError, match="is a pipe"):
        manifest.collect(tmp_path)
