from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_a_run_is_judged_at_its_checkpoints_and_strengths(cli, recipe):
    assert cli("train", recipe, "train.checkpoint_every=1", "train.steps=2", "train.lr=1e-2").code == 0
    result = cli(
        "evaluate", "runs/tiny", "--clip", "pocket/clip", "--scales", "0.5,1", "--checkpoints", "--out", "c.json"
    )
    assert result.code == 0, result.err
    written = json.loads(Path("c.json").read_text())
    assert [(p["step"], p["scale"]) for p in written["points"]] == [(0, 0), (1, 0.5), (1, 1), (2, 0.5), (2, 1)]
    assert written["points"][0]["learnt"] == 0 and written["points"][0]["kept"] == pytest.approx(1, abs=1e-3)
    assert written["best"] in written["points"] and "best: step" in result.out
    final = cli("evaluate", "runs/tiny", "--clip", "pocket/clip", "--out", "d.json")
    assert final.code == 0, final.err
    assert json.loads(Path("d.json").read_text())["points"][1]["scores"] == written["points"][-1]["scores"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/none"], "holds no finished run"),
        (["runs/none", "--scales", "a"], "list of numbers"),
        (["runs/none", "--scales", "1,nan"], "between -4 and 4"),
        (["runs/none", "--out", "x.txt"], ".json file"),
    ],
)
def test_what_cannot_be_judged_is_one_line(cli, words, message):
    result = cli("evaluate", *words)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
