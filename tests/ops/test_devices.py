"""Devices by name: what this torch cannot do is refused, with what it can."""

from __future__ import annotations

import pytest
import torch

from visiontune.errors import UserError
from visiontune.ops import devices


@pytest.mark.parametrize(
    "name",
    [
        "mps",
        "xpu",
        "xla",
        "hpu",
        "meta",
        "vulkan",
        "privateuseone",
        "cpu:3",
        "foo",
        "cuda",
        "cuda:0",
        "",
        "cpu\n",
        "auto",
    ],
)
def test_a_machine_without_an_accelerator_has_its_cpu_alone(monkeypatch, name):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^--device '.*' is not on this machine.*: take one of cpu$"):
        devices.check_device(name, "--device")
    devices.check_device("cpu", "--device")
    devices.check_device("auto", "device", ("auto",))


def test_an_accelerator_is_known_by_its_name_and_by_each_number(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        devices.check_device(name, "device")
    for name in ("cuda:2", "mps", "cuda:-1"):
        with pytest.raises(UserError, match=r"take one of auto, cpu, cuda, cuda:0, cuda:1$"):
            devices.check_device(name, "device", ("auto",))
