from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from visiontune import catalogue, plugin
from visiontune.cli.list import SECTIONS, entries

ROOT = Path(__file__).parents[2]


def test_list_prints_every_entry_of_every_section(cli):
    result = cli("list")
    assert result.code == 0
    for kind in catalogue.KINDS:
        assert all(name in result.out for name in catalogue.names(kind))
    for kind in ("adapters", "objectives", "guidance", "search", "rewards"):
        assert all(name in result.out for name in plugin.names(kind))
    assert "sd family" in result.out and "sdxl family" in result.out


@pytest.mark.parametrize("section", SECTIONS)
def test_every_entry_has_a_summary(cli, section):
    assert all(summary for _, summary in entries(section))
    assert cli("list", section).out.splitlines()[0] == f"{section}:"


def test_show_prints_a_recipe_as_it_is(cli):
    text = (ROOT / "pipelines/personalise/oft.yaml").read_text()
    assert cli("show", "personalise/oft").out.strip() == text.strip()


@pytest.mark.parametrize("kind", ["adapters", "objectives", "guidance", "search", "rewards"])
def test_show_prints_every_option_of_every_method_with_its_help(cli, kind):
    for name in plugin.names(kind):
        out = cli("show", name).out
        module = plugin.load(kind, name)
        assert module.__doc__.splitlines()[0] in out
        for field in dataclasses.fields(module.Config):
            assert f"  {field.name}: " in out
            assert field.metadata["help"].split()[0] in out


def test_show_prints_the_sections_of_a_recipe(cli):
    out = cli("show", "train").out
    assert "steps: a whole number from 1 to 1000000000; default 1000" in out
    assert "prompts: text or a list of texts\n" in cli("show", "sample").out


def test_copy_never_overwrites(cli, tmp_path):
    result = cli("copy", "personalise/oft")
    assert result.code == 0 and "visiontune train oft.yaml" in result.out
    assert (tmp_path / "oft.yaml").read_text() == (ROOT / "pipelines/personalise/oft.yaml").read_text()
    (tmp_path / "oft.yaml").write_text("mine")
    again = cli("copy", "personalise/oft")
    assert again.code == 2 and "exists already" in again.err
    assert (tmp_path / "oft.yaml").read_text() == "mine"
    assert cli("copy", "sample/prompts", "deep/mine.yaml").code == 0
    assert (tmp_path / "deep/mine.yaml").is_file()


def test_overrides_may_stand_on_either_side_of_an_option(cli, monkeypatch):
    seen = []
    monkeypatch.setattr("visiontune.demo.run", lambda out, overrides: seen.append((out, overrides)))
    assert cli("demo", "train.steps=1", "--out", "here", "train.lr=2").code == 0
    assert cli("demo", "--out", "here", "train.steps=1").code == 0
    assert seen == [(Path("here"), ["train.steps=1", "train.lr=2"]), (Path("here"), ["train.steps=1"])]


def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} -m visiontune list | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "recipes:\n" and done.stderr == ""
