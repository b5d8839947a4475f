"""Objectives from outside the package: what goes wrong in them is one line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_training import tiny_trainer

from visiontune.assemble import parts
from visiontune.core import Loss
from visiontune.errors import UserError
from visiontune.objectives.base import Needs, Online, Supervised

HEAD = "from dataclasses import dataclass\n\n@dataclass\nclass Config: ...\n\n"


def objective(base: type, **calls):
    """An objective of this file, of methods that are functions of nothing."""
    inert = {"loss": None, "collect": None, "update": None, "probe": None}
    made = {
        name: (lambda self, *args, call=call: call() if call else None) for name, call in {**inert, **calls}.items()
    }
    if base is Online:
        made["needs"] = Needs(online=True)
    return type("Mine", (base,), {**made, "__module__": __name__})()


def fail():
    raise ValueError("not\ntoday")


@pytest.mark.parametrize(
    ("base", "calls", "words"),
    [
        (Supervised, {"loss": fail}, r"'tests.objectives.test_outside', loss, raised ValueError: not today \(test_out"),
        (Supervised, {"loss": lambda: exit(0)}, r"loss, called exit\(0\)"),
        (Supervised, {"loss": lambda: torch.zeros(())}, "returned a Tensor, not a Loss"),
        (Supervised, {"loss": lambda: Loss(total=torch.zeros(2))}, "not a Loss whose total is one number"),
        (Supervised, {"loss": lambda: Loss(total=torch.zeros(()))}, "a loss that no gradient can be taken of"),
        (Supervised, {"setup": fail}, "setup, raised ValueError"),
        (Online, {"collect": fail}, "collect, raised ValueError"),
        (Online, {"update": fail}, "update, raised ValueError"),
        (Online, {"update": lambda: 3}, "returned a int, not a Loss"),
    ],
)
def test_what_an_objective_from_outside_does_wrong_is_one_line(tmp_path, base, calls, words):
    with pytest.raises(UserError, match=words) as error:
        tiny_trainer(tmp_path, objective=objective(base, **calls)).fit()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("body", ["return 3", "return lambda *args: 3"])
def test_what_is_built_must_be_an_objective(tmp_path, body):
    (tmp_path / "mine.py").write_text(f"{HEAD}def build(config):\n    {body}\n")
    with pytest.raises(
        UserError, match=r"mine.py' built a \w+: its build\(config\) must return a Supervised or Online"
    ):
        parts.open_objective(SimpleNamespace(objective={"name": str(tmp_path / "mine.py")}))


def test_needs_of_an_objective_from_outside_are_needs(tmp_path):
    text = "from visiontune.objectives.base import Supervised\n" + HEAD
    text += "class Mine(Supervised):\n    needs = 3\n    loss = None\n\ndef build(config):\n    return Mine()\n"
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match="whose needs are Needs"):
        parts.open_objective(SimpleNamespace(objective={"name": str(tmp_path / "mine.py")}))
