"""Values made ahead of their use."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
import torch
from PIL import Image

from visiontune.data.ahead import Ahead
from visiontune.data.base import Config, Sample, Source
from visiontune.data.loader import BatchSampler
from visiontune.data.rows import Rows


class Maker:
    """Squares, made one at a time; ``calls`` are the numbers and the threads that they were made in."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.busy = seconds, threading.Lock()
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, number: int) -> int:
        assert self.busy.acquire(blocking=False), "two threads make at once"
        self.calls.append((number, threading.current_thread() is threading.main_thread()))
        time.sleep(self.seconds)
        self.busy.release()
        return number**2


def making() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("making")]


def test_the_next_value_is_made_while_the_caller_works():
    make = Maker(0.05)
    ahead = Ahead(make, worth=0.01)
    assert ahead.get(3) == 9
    time.sleep(0.2)
    assert make.calls == [(3, True), (4, False)]
    started = time.perf_counter()
    assert ahead.get(4) == 16
    assert time.perf_counter() - started < 0.04
    ahead.close()


def test_any_order_gives_the_same_values_and_nothing_is_made_in_two_threads():
    make = Maker(0.005)
    ahead = Ahead(make, worth=0.0)
    order = [0, 1, 2, 7, 7, 8, 3, 4, 0, 1]
    assert [ahead.get(n) for n in order] == [n**2 for n in order]
    ahead.close()
    made = [n for n, _ in make.calls]
    assert made == [0, 1, 2, 3, 7, 8, 7, 8, 9, 3, 4, 5, 0, 1, 2]


def test_what_is_quickly_made_is_made_when_it_is_asked_for():
    make = Maker()
    ahead = Ahead(make, worth=0.5)
    assert [ahead.get(n) for n in range(5)] == [0, 1, 4, 9, 16]
    assert make.calls == [(n, True) for n in range(5)] and not making()


def test_a_slow_first_value_starts_no_habit():
    make = Maker(0.03)
    ahead = Ahead(make, worth=0.02)
    ahead.get(0)
    make.seconds = 0.0
    ahead.get(1)  # made ahead, as slowly as the first or at once
    ahead.get(2)
    ahead.get(3)
    assert make.calls[-1] == (3, True)


def test_an_error_comes_at_the_value_that_has_it_and_at_no_other():
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    ahead = Ahead(make, worth=-1.0)
    assert [ahead.get(0), ahead.get(1)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        ahead.get(2)
    assert ahead.get(1) == 1  # the error of 2, made ahead again, does not come out here
    assert ahead.get(3) == 3
    ahead.get(1)
    ahead.close()


def test_closing_ends_the_thread_and_values_can_be_had_again():
    make = Maker(0.05)
    ahead = Ahead(make, worth=0.01)
    ahead.get(0)
    assert making()
    ahead.close()
    assert not making()
    assert ahead.get(1) == 1 and [n for n, _ in make.calls][:2] == [0, 1]
    ahead.close()
    ahead.close()
    assert [n for n, _ in make.calls] == [0, 1, 2]


def test_batches_are_the_same_ahead_or_not(model, tmp_path, monkeypatch):
    monkeypatch.setattr("visiontune.data.loader.Ahead", partial(Ahead, worth=-1.0))

    def sample(i: int) -> Sample:
        return Sample(
            id=f"{i}", sources={"image": Source(lambda: Image.new("RGB", (32, 32), (i,) * 3))}, caption=f"{i}"
        )

    def sampler(name: str) -> BatchSampler:
        rows = Rows(
            model, [sample(i) for i in range(7)], Config(root="x", flip=True, caption_dropout=0.3), tmp_path / name
        )
        return BatchSampler(rows, 2, ahead=name == "ahead")

    threads = set()
    embed = model.embed
    model.embed = lambda prompts: (threads.add(threading.current_thread().name), embed(prompts))[1]
    plain, ahead = sampler("plain"), sampler("ahead")
    for step in (0, 1, 2, 5, 6, 3):
        one, other = plain.batch(step), ahead.batch(step)
        assert one.ids == other.ids and one.prompts == other.prompts
        assert torch.equal(one.data["image"], other.data["image"]) and torch.equal(one.cond.tokens, other.cond.tokens)
    assert "making batch 1" in threads
    ahead.close()
    plain.close()
    assert not making()
