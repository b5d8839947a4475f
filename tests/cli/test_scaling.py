"""``visiontune scaling``: a file of runs in, a law and what it expects out."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def log(tmp_path):
    rows = [{"name": f"r{n}", "flops": 3.0, "steps": n, "loss": 2 * (3 * n) ** -0.25} for n in (10, 20, 40, 80, 160)]
    file = tmp_path / "runs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return file


def test_a_law_of_a_product_and_what_it_expects(cli, log):
    done = cli("scaling", log, "--x", "flops*steps", "--y", "loss", "--at", 2)
    assert done.code == 0, done.err
    assert "b -0.25  [-0.25, -0.25]" in done.out and "5 runs" in done.out
    assert f"at 2 times the largest: {2 * 960**-0.25:.5g}" in done.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--x", "images", "--y", "loss"], "line 1 has no number 'images': take one that all runs have; here: flops"),
        (["--x", "name", "--y", "loss"], "has no number 'name'"),
        (["--x", "flops", "--y", "loss"], "1 different sizes are too few"),
        (["--x", "steps", "--y", "loss", "--at", "11"], "more than 10 times beyond"),
    ],
)
def test_what_it_refuses(cli, log, words, line):
    done = cli("scaling", log, *words)
    assert done.code == 2 and line in done.err and len(done.err.strip().splitlines()) == 1


def test_a_line_that_is_no_run_is_named(cli, tmp_path):
    (tmp_path / "bad.jsonl").write_text("[1, 2]\n")
    assert "line 1 is no run" in cli("scaling", "bad.jsonl", "--x", "a", "--y", "b").err
