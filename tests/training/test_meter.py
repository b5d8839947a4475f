"""Logged means over processes that do not all know the same names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from visiontune.training import trackers
from visiontune.training.trackers import Meter


def test_means_are_of_all_that_any_process_has_added(monkeypatch):
    one, two = Meter(), Meter()
    for value in (1.0, 2.0):
        one.add({"loss": torch.tensor(value)})
    one.add({"low": torch.tensor(5.0)})
    two.add({"loss": torch.tensor(6.0), "high": torch.tensor(7.0)})
    seen = []
    monkeypatch.setattr(trackers, "gather_object", lambda own: seen.append(own[0]) or own)
    for meter in (one, two):
        meter.reduce(SimpleNamespace(num_processes=2))
    monkeypatch.setattr(trackers, "gather_object", lambda own: seen)
    one.reduce(SimpleNamespace(num_processes=2))
    assert one.take() == pytest.approx({"loss": 3.0, "low": 5.0, "high": 7.0})


def test_one_process_keeps_what_it_has():
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0)})
    meter.reduce(SimpleNamespace(num_processes=1))
    assert meter.take() == {"loss": 1.0}
