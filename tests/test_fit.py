"""The ladder of settings: what its rungs are, where it ends, and that each is measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from visiontune import config, fit
from visiontune.errors import UserError

RECIPE = {
    "name": "t",
    "adapter": {"name": "lora"},
    "data": "pocket/bumble",
    "train": {"batch_size": 6, "accumulate": 2},
}


def read(words=(), **changes):
    return config.parse_run(config.apply({**RECIPE, **changes}, words))


def test_every_rung_keeps_those_before_it_and_the_rows_of_a_step():
    rungs = list(fit.ladder(read()))
    assert rungs[:2] == [(), ("train.gradient_checkpointing=true",)]
    assert rungs[2] == ("train.gradient_checkpointing=true", "train.batch_size=3", "train.accumulate=4")
    assert rungs[3] == ("train.gradient_checkpointing=true", "train.batch_size=1", "train.accumulate=12")
    runs = [read(words) for words in rungs]
    assert {run.train.batch_size * run.train.accumulate for run in runs} == {12}
    assert [run.model.quantize for run in runs[4:6]] == ["int8", "nf4"]
    # Blocks that rest come last, for they cost the most time; codes of bitsandbytes do not move.
    assert [(run.model.quantize, run.model.offload) for run in runs[6:]] == [(None, "block"), ("int8", "block")]
    assert "model.quantize" not in " ".join(rungs[6]) and {*rungs[7]} == {*rungs[6], "model.quantize=int8"}


def test_what_a_recipe_has_already_is_no_rung():
    words = ["train.batch_size=1", "train.gradient_checkpointing=true", "model.quantize=int8"]
    assert list(fit.ladder(read(words))) == [(), ("model.offload=block",)]
    assert list(fit.ladder(read([*words, "model.offload=block"]))) == [()]
    # All weights are trained, so none can be codes or rest.
    assert not any("model." in w for rung in fit.ladder(read(["adapter=none"])) for w in rung)


def test_an_online_objective_takes_smaller_micro_batches():
    online = ["objective={name: alignprop, micro_batch: 4}", "reward=redness", "data=pocket/prompts"]
    rungs = list(fit.ladder(read(online, train={"batch_size": 8})))
    assert ("train.gradient_checkpointing=true", "objective.micro_batch=2") in rungs
    assert not any("accumulate" in w for rung in rungs for w in rung)


def needs(sizes, monkeypatch):
    """A stand-in for a device on which the rungs cost so much; an error is raised."""
    costs = iter(sizes)

    def measure(run):
        cost = next(costs)
        if isinstance(cost, Exception):
            raise cost
        return SimpleNamespace(memory_bytes=cost, step_seconds=1.0)

    monkeypatch.setattr(fit, "measure", measure)


def test_the_ladder_ends_at_the_first_rung_that_fits(monkeypatch):
    import torch

    needs([torch.OutOfMemoryError(), UserError("has no gradient checkpointing"), 11, 10, 1], monkeypatch)
    rungs = list(fit.climb(read, 10))
    assert [rung.fits(10) for rung in rungs] == [False, False, False, True]
    assert "more than this device has" in rungs[0].text() and "no gradient checkpointing" in rungs[1].text()
    assert "11 B        1 s/step  train.gradient_checkpointing=true train.batch_size=3" in rungs[2].text()
    needs([UserError("no such folder")], monkeypatch)
    with pytest.raises(UserError, match="no such folder"):
        list(fit.climb(read, 10))
    needs(range(99, 0, -1), monkeypatch)
    assert len(list(fit.climb(read, None))) == len(list(fit.ladder(read())))


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("1.5 mb", 1_500_000), ("512", 512), ("all", None)]
)
def test_sizes_are_read_as_they_are_written(text, size):
    assert fit.parse(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "-1GB", "24 bananas", "1e9", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="is no size: write 24GB"):
        fit.parse(text)
