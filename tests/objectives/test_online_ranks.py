"""Two processes of gloo train what one does with all their prompts: rewards, pairs and gradients are those of all."""

from __future__ import annotations

import json

import pytest
import torch
from objectives import ranks_worker as worker
from processes import apart
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    assert apart("objectives.ranks_worker:two", out) == [0, 0]
    return out


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", worker.NAMES)
def test_two_processes_train_like_one(two, tmp_path, name):
    worker.fit(tmp_path, name, 0, 1)
    one, other = (load_file(folder / name / "adapter.safetensors") for folder in (tmp_path, two))
    # LoRA's second factors start at 0, so all that they hold was learnt.
    learnt, also = (torch.cat([v.flatten() for k, v in sorted(f.items()) if k.endswith("up")]) for f in (one, other))
    assert learnt.norm() > 1e-4
    assert (also - learnt).norm() < 1e-3 * learnt.norm()
    for single, double in zip(rows(tmp_path / name), rows(two / name), strict=True):
        for term in single.keys() - {"seconds"}:
            assert double[term] == pytest.approx(single[term], rel=1e-3, abs=1e-4), term
