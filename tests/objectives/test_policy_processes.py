"""Groups, advantages and gradients do not depend on how many processes share a rollout."""

from __future__ import annotations

import json

import pytest
import torch
from objectives import policy_worker as worker
from processes import apart
from safetensors.torch import load_file

from visiontune.training import checkpoint


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["ddpo", "grpo"])
def test_two_processes_train_like_one_with_both_their_batches(tmp_path, name):
    assert apart("objectives.policy_worker:two", tmp_path / "two", name) == [0, 0]
    result = worker.trainer(tmp_path / "one", name, 16).fit()
    one, two = load_file(result / "weights.safetensors"), load_file(tmp_path / "two" / "model" / "weights.safetensors")
    start = worker.trainer(tmp_path / "start", name, 16).parameters
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(value, start[f"unet.{key}"]) for key, value in one.items())
    terms = {"reward", "reward_std", "advantage", "flat_prompts", "loss", "grad_norm"} & rows(tmp_path / "one")[
        0
    ].keys()
    assert {"advantage", "reward_std"} <= terms
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert {k: ours[k] for k in terms} == pytest.approx({k: theirs[k] for k in terms}, rel=1e-4, abs=1e-6)
    states = [checkpoint.load(checkpoint.latest(tmp_path / run))[1]["parts"]["objective"] for run in ("one", "two")]
    assert states[0].keys() == states[1].keys() == ({"reward"} if name == "ddpo" else set())
    for name in states[0]:
        assert states[0][name].keys() == states[1][name].keys()
        for prompt, values in states[0][name].items():
            assert states[1][name][prompt] == pytest.approx(values, rel=1e-5)
