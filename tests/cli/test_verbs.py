"""A verb is a file of ``visiontune.cli``."""

from __future__ import annotations

import re
import sys

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
    assert list(lines) == ["check", "copy", "demo", "export", "import", "list", "sample", "score", "show", "train"]
    assert lines["train"] == "train what a recipe describes"
