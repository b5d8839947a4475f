"""A verb is a file of ``visiontune.cli``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import visiontune
from visiontune import cli as package

TOY = '''"""Say a word, twice if need be."""

def add_arguments(parser):
    parser.add_argument("word")
    parser.add_argument("--twice", action="store_true")

def run(args):
    print(args.word * (1 + args.twice))
'''


def test_a_file_adds_a_verb(cli, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "verbs"
    folder.mkdir()
    (folder / "echo.py").write_text(TOY)
    (folder / "helper.py").write_text("def run(args): ...\n")
    (folder / "words_of.py").write_text("def add_arguments(parser): ...\n")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    for name in ("echo", "helper", "words_of"):
        monkeypatch.setitem(sys.modules, f"visiontune.cli.{name}", None)
        del sys.modules[f"visiontune.cli.{name}"]
    assert cli("echo", "ab", "--twice").out == "abab\n"
    refused = cli("echo", "ab", "--thrice")
    assert refused.code == 2
    assert refused.err == "visiontune echo: unknown argument: --thrice (see visiontune echo --help)\n"
    for helper in ("helper", "words_of"):
        assert f"invalid choice: '{helper}'" in cli(helper).err


def test_help_lists_every_verb_with_its_summary(cli):
    out = cli("--help").out
    lines = dict(re.findall(r"^ {4}(\S+) +(.*)$", out, re.MULTILINE))
    verbs = [
        "check",
        "copy",
        "demo",
        "evaluate",
        "expand",
        "export",
        "import",
        "list",
        "merge",
        "sample",
        "scaling",
        "score",
        "show",
        "train",
        "view",
    ]
    assert list(lines) == verbs
    assert lines["train"] == "train what a recipe describes"


def test_nothing_is_said_but_our_own_words(tiny_folder, tmp_path):
    """In a process of its own, where everything is imported for the first time."""
    words = ["sample", f"model={tiny_folder}", "prompts=a circle", "steps=1", "seeds=1", "device=cpu", "sheet=0"]
    told = dict(os.environ, PYTHONPATH=str(Path(visiontune.__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-m", "visiontune", *words], cwd=tmp_path, env=told, capture_output=True, text=True, check=True
    )
    assert done.stdout == "finished: runs/samples/manifest.jsonl\nruns/samples/index.html shows it\n"
    assert {line.split("%")[0].strip() for line in done.stderr.replace("\r", "\n").splitlines()} <= {"", "0", "100"}


def test_check_finds_the_first_setting_that_fits(cli, recipe):
    words = ["check", recipe, "train.batch_size=2", "adapter.rank=1"]
    rung = "train.gradient_checkpointing=true"
    plain = cli(*words, "--fit", "1TB")
    assert plain.code == 0 and plain.out.splitlines()[-1] == "fits 1TB: the recipe as it is"
    assert "memory: " in plain.out and rung not in plain.out
    peak = float(next(line for line in plain.out.splitlines() if line.endswith("the recipe as it is")).split()[0])
    most = f"{0.8 * peak:.3f}MiB"
    fitting = cli(*words, "--fit", most)
    assert fitting.code == 0 and fitting.out.splitlines()[-1].startswith(f"fits {most}: {rung}"), fitting.out
    wrong = cli(*words, "--fit", "much")
    assert wrong.code == 2 and "write 24GB" in wrong.err
