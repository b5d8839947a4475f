"""Whatever stands for an option in a recipe is taken or refused in one line, never a traceback."""

from __future__ import annotations

import dataclasses
import datetime

import pytest
from options import owners

from visiontune.config import parse_run
from visiontune.errors import UserError
from visiontune.schema import from_mapping

OWNERS = owners()
VALUES = [5, -1, 1.5, True, None, "x", "", "a\0", "\ud800", [1], ["a"], [[]], {"a": 1}, {1: 2}, {"name": 5}, [None]]
VALUES += [{None: None}, datetime.date(2024, 1, 1), {"a"}, b"x", float("nan"), 10**400, {"a": {"b": [{}]}}]
VALUES += [int("f" * 5000, 16), {int("f" * 5000, 16): 1}, {"a\0": 1}]
RUN = {"name": "x", "adapter": "lora", "data": "pocket/bumble"}


def taken_or_refused(make, *args):
    try:
        make(*args)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", OWNERS)
def test_options_of_methods_and_sections(name):
    fields = dataclasses.fields(OWNERS[name])
    required = {
        f.name: "x" for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    for field in fields:
        for value in VALUES:
            taken_or_refused(from_mapping, OWNERS[name], required | {field.name: value})


@pytest.mark.parametrize("section", [*(f.name for f in dataclasses.fields(OWNERS["run"])), "nothing", 5, None])
def test_sections_of_a_run(section):
    for value in VALUES:
        taken_or_refused(parse_run, {**RUN, section: value})


@pytest.mark.parametrize("section", ["adapter", "objective", "reward"])
@pytest.mark.parametrize("option", ["name", "targets", "start", "under"])
def test_options_of_every_method(section, option):
    name = {"adapter": "lora", "objective": "denoising", "reward": "oracle"}[section]
    for value in VALUES:
        taken_or_refused(parse_run, {**RUN, section: {"name": name, option: value}})
