"""Two processes of gloo train what one does with all their prompts: rewards, pairs and gradients are those of all."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__)
spec = importlib.util.spec_from_file_location("ranks", HERE.with_name("ranks.py"))
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, HERE.parents[1:3])), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE.with_name("ranks.py"), out], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "0"], done.stderr[-2000:]
    return out


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ranks.NAMES)
def test_two_processes_train_like_one(two, tmp_path, name):
    ranks.fit(tmp_path, name, 0, 1)
    one, other = (load_file(folder / name / "adapter.safetensors") for folder in (tmp_path, two))
    # LoRA's second factors start at 0, so all that they hold was learnt.
    learnt, also = (torch.cat([v.flatten() for k, v in sorted(f.items()) if k.endswith("up")]) for f in (one, other))
    assert learnt.norm() > 1e-4
    assert (also - learnt).norm() < 1e-3 * learnt.norm()
    for single, double in zip(rows(tmp_path / name), rows(two / name), strict=True):
        for term in single.keys() - {"seconds"}:
            assert double[term] == pytest.approx(single[term], rel=1e-3, abs=1e-4), term
