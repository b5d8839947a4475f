"""Runs that are asked to end, and what runs that were killed leave behind."""

from __future__ import annotations

import signal

import pytest
import torch
from processes import apart
from safetensors.torch import load_file
from tiny_training import tiny_trainer
from training import worker

from visiontune.signals import Asked, Interrupted, Terminated, terminable
from visiontune.training import checkpoint


def asked(trainer, at, *numbers):
    """A run that gets signals while it computes batch ``at``."""
    loss = trainer.loss

    def signalled(index):
        if index == at:
            for number in numbers:
                signal.raise_signal(number)  # one of its kind waits for none before it, as two of os.kill may
        return loss(index)

    trainer.loss = signalled
    return trainer


def test_a_signal_that_a_process_was_started_to_ignore_is_none(tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.signal(number, signal.SIG_IGN)
        try:
            with terminable():
                asked(tiny_trainer(tmp_path / number.name, steps=4, checkpoint_every=2), 2, number, number).fit()
        finally:
            signal.signal(number, before)
        assert checkpoint.steps(tmp_path / number.name) == [2, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("every", [1, 100])
def test_a_signal_ends_after_the_step_with_a_checkpoint_and_the_run_goes_on_to_the_same_bits(tmp_path, number, every):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=r"after step 4; .*step-000004") as stop:
        asked(worker.trainer(tmp_path / "a", checkpoint_every=every), 6, number).fit()
    assert stop.value.status == 128 + number
    assert checkpoint.steps(tmp_path / "a")[-1] == 4 and not (tmp_path / "a" / "model").exists()
    assert not (tmp_path / "a" / ".lock").exists()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    worker.trainer(tmp_path / "a", checkpoint_every=every).fit()
    worker.trainer(tmp_path / "b", checkpoint_every=every).fit()
    one, other = (load_file(tmp_path / name / "model" / "weights.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("numbers", "error"),
    [((signal.SIGINT, signal.SIGINT), KeyboardInterrupt), ((signal.SIGINT, signal.SIGTERM), Terminated)],
)
def test_a_second_signal_ends_at_once_and_leaves_nothing_half_written(tmp_path, numbers, error):
    with terminable(), pytest.raises(error):
        asked(tiny_trainer(tmp_path, steps=6, checkpoint_every=2), 4, *numbers).fit()
    assert checkpoint.steps(tmp_path) == [2, 4]
    assert not list(tmp_path.rglob("*.tmp*"))


def test_a_run_that_is_asked_in_its_last_step_is_finished(tmp_path):
    asked(tiny_trainer(tmp_path, steps=3), 2, signal.SIGTERM).fit()
    assert (tmp_path / "model").exists()


def test_signals_reach_the_main_thread_alone():
    import threading

    seen = []
    thread = threading.Thread(target=lambda: [Asked("it").__enter__(), terminable().__enter__(), seen.append(1)])
    thread.start()
    thread.join()
    assert seen


def test_all_processes_stop_after_the_same_step_when_one_is_asked(tmp_path):
    assert apart("training.worker:signalled", tmp_path) == [12, 12]


def test_what_a_killed_run_was_writing_is_removed_and_nothing_else(tmp_path):
    places = (".written", "step-000003", "model", "README.md")
    (tmp_path / "checkpoints").mkdir()
    names = (".notes.12.tmp.md", ".README.tmp.md", ".README.x.tmp.md", "checkpoints/.a.1.tmp")
    own = [tmp_path / name for name in names]
    for path in own:
        path.write_text("mine")
    ends = apart("training.worker:deaths", tmp_path, *(f"replace:{name}" for name in places))
    assert [code for code, *_ in ends] == [-signal.SIGKILL] * len(places)
    assert [path for path in tmp_path.rglob(".*.tmp*") if path not in own]
    worker.trainer(tmp_path).fit()
    assert sorted(tmp_path.rglob(".*.tmp*")) == sorted(own)
    assert all(path.read_text() == "mine" for path in own)
