"""One thread or all: by trial, unless the user has chosen."""

from __future__ import annotations

import time

import pytest
import torch

from visiontune.ops import threads
from visiontune.ops.threads import SMALL, Threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four(monkeypatch):
    """A torch of four threads, which are only counted."""
    count = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: count[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: count.__setitem__(0, n))
    for name in threads._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return count


def starving():
    """Work that takes longer with more threads."""
    time.sleep(0.004 * torch.get_num_threads())


def dividing():
    """Work that is shared among threads."""
    time.sleep(0.02 / torch.get_num_threads())


@pytest.mark.parametrize(("work", "best"), [(starving, 1), (dividing, 4)])
def test_the_faster_number_is_kept(work, best):
    assert Threads(CPU, 1000).choose(work) == best == torch.get_num_threads()


def test_a_number_that_was_given_is_taken_and_nothing_is_tried(monkeypatch):
    def never():
        raise AssertionError("tried")

    assert Threads(CPU, 1000, given=3).choose(never) == 3
    assert Threads(torch.device("cuda"), 1000).choose(never) == 3
    assert Threads(CPU, SMALL + 1).choose(never) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Threads(CPU, 1000).choose(never) == 3


def test_steps_that_have_become_slow_ask_for_another_trial():
    chosen = Threads(CPU, 1000)
    chosen.choose(dividing)
    assert not any(chosen.slowed(0.1) for _ in range(20))
    # One slow step says nothing; half a window does.
    assert not any(chosen.slowed(s) for s in [5.0, 0.1, 0.1, 5.0, 0.1, 0.1])
    assert [chosen.slowed(0.5) for _ in range(8)][-1]
    assert chosen.choose(starving) == 1
    assert not any(chosen.slowed(0.5) for _ in range(20))


def test_a_run_that_goes_on_computes_with_as_many_as_before(monkeypatch):
    first = Threads(CPU, 1000)
    assert first.begin(starving) == 1
    saved = first.state_dict()
    torch.set_num_threads(4)
    again = Threads(CPU, 1000)
    again.load_state_dict(saved)
    assert again.begin(dividing) == 1 and again.choose(dividing) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    told = Threads(CPU, 1000)
    told.load_state_dict(saved)
    assert told.begin(starving) == 4
