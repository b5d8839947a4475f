"""Values that no option can have, and what escapes all the same: one line, and no model is opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from options import Numeric, numeric

from visiontune import config, plugin
from visiontune.config import sections


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Whatever opens a model fails the test."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("visiontune.models.load", opened)
    monkeypatch.setattr("visiontune.rewards.loading.load", opened)


def refused(result, *words: str) -> None:
    assert result.code == 2, result
    assert result.err.count("\n") == 1 and result.err.startswith("visiontune"), result.err
    assert len(result.err) < 500
    for word in words:
        assert word in result.err


def hostile(number: Numeric) -> list[str]:
    """Texts that are no value of an option."""
    low, high = number.limits.least, number.limits.greatest
    words = ["nan", "[[]]", "{a: 1}", "9" * 5000, "1" + "0" * 400, "true", "many", "'", "\0"]
    words += ["-1e300", str(number.kind(low - 1))] if low not in (None, float("-inf")) else []
    words += ["1e300", str(number.kind(high * 2 + 1))] if high not in (None, float("inf")) else []
    words += [str(number.limits.above)] if number.limits.above is not None else []
    words += [str(number.limits.below)] if number.limits.below is not None else []
    return words


def bare(owner: type) -> list[Numeric]:
    """The numeric options that are a number by themselves, not in a list or mapping."""
    return [n for n in numeric(owner) if n.options(1).get(n.path) == 1]


TRAIN = ("train", "data", "preview", "guards", "model")


@pytest.mark.parametrize("section", TRAIN)
def test_numbers_of_the_sections_of_a_recipe(cli, unchanged, section):
    recipe = "reward_tune/alignprop" if section == "guards" else "personalise/lora"
    with unchanged:
        for number in bare(sections()[section]):
            for word in hostile(number):
                refused(cli("train", recipe, f"{section}.{number.path}={word}"), f"{section}.{number.path}")


@pytest.mark.parametrize("kind", ["adapters", "objectives"])
def test_numbers_of_methods(cli, unchanged, kind):
    section = kind.removesuffix("s")
    with unchanged:
        for name in plugin.names(kind):
            for number in bare(plugin.load(kind, name).Config):
                for word in ("nan", hostile(number)[-1]):
                    words = [f"{section}={name}", f"{section}.{number.path}={word}", "guards=none"]
                    refused(cli("train", "personalise/lora", *words), f"{section}.{number.path}")


def test_numbers_of_the_other_verbs(cli, unchanged, tmp_path):
    (tmp_path / "p").mkdir()
    with unchanged:
        for number in bare(sections()["sample"]):
            for word in hostile(number):
                refused(cli("sample", "prompts=a", "out=o", f"{number.path}={word}"), number.path)
        for number in bare(sections()["train"])[:2]:
            refused(cli("demo", f"train.{number.path}=nan"), f"train.{number.path}")
            refused(cli("check", "personalise/lora", f"train.{number.path}=nan"), f"train.{number.path}")
        refused(cli("train", "personalise/lora", "seed=18446744073709551616"), "seed")
        for word in ("nan", "inf", "1e300", "0.5", "-1", "0", "1" + "0" * 400, "9" * 5000, "x", "[]", ""):
            refused(cli("score", "p", "brightness", "--batch-size", word), "--batch-size")
            refused(cli("export", "a.safetensors", "b.safetensors", "--rank", word), "--rank")
        for word in ("nan", "inf", "-inf", "1e300", "1" + "0" * 400, "x", ""):
            refused(cli("export", "a.safetensors", "b.safetensors", f"--scale={word}"), "--scale")


@pytest.mark.parametrize("name", [n for n in plugin.names("rewards") if bare(plugin.load("rewards", n).Config)])
def test_numbers_of_rewards(cli, unchanged, name, tmp_path):
    (tmp_path / "p").mkdir()
    with unchanged:
        for number in bare(plugin.load("rewards", name).Config):
            for word in hostile(number):
                with pytest.raises(config.UserError, match=number.path):
                    plugin.configure("rewards", {"name": name, number.path: word}, name)


LONG = "a" * 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "personalise/lora", f"name={LONG}"), "name of more than 220 bytes"),
        (("train", "personalise/lora", f"out={LONG}"), "name of more than 220 bytes"),
        (("train", "personalise/lora", "out=~nosuchuser/x"), "is no name of"),
        (("train", "personalise/lora", "name=a\0b"), "name holds a null character"),
        (("train", "personalise/lora", "name=."), "cannot be a folder"),
        (("train", "personalise/lora", "name="), "cannot be a folder"),
        (("train", "personalise/lora", "out=f/g"), "f is a file: choose another"),
        (("train", "personalise/lora", "out=loop"), "symbolic links"),
        (("sample", "prompts=a", f"out={LONG}"), "name of more than 220 bytes"),
        (("sample", "prompts=a", "out=~nosuchuser/x"), "is no name of"),
        (("sample", "prompts=a", "out=a\0b"), "out holds a null character"),
        (("sample", "prompts=a\udcff"), "prompts is not UTF-8 text"),
        (("train", "personalise/lora", "data.trigger=\udcff"), "data.trigger is not UTF-8 text"),
        (("train", "personalise/lora", "train.optimizer_options={a: .nan}"), "train.optimizer_options.a must be a fin"),
        (("train", "personalise/lora", "train.x=" + "[" * 1000), "train.x is not an option"),
        (("train", "personalise/lora", "a." * 2000 + "b=1"), "is not an override"),
        (("train", "personalise/lora", "data=2024-13-45", "out=~nosuchuser"), "is no name of"),
        (("train", "pipe.yaml"), "is a pipe or a device"),
        (("train", "f.yaml"), "is a folder"),
        (("train", "deep.yaml"), "nests too deep"),
        (("train", "date.yaml"), "a date or a number that cannot be"),
        (("train", "digits.yaml"), "a date or a number that cannot be"),
        (("train", "extends.yaml"), "extends no recipe"),
        (("train", f"{LONG}.yaml"), "File name too long"),
        (("train", "set.yaml"), "adapter must be a mapping"),
        (("train", "hex.yaml"), "train.steps must be a whole number from 1"),
        (("show", f"{LONG}.yaml"), "File name too long"),
        (("show", "pipe.yaml"), "is a pipe or a device"),
        (("copy", "personalise/lora", "f/x.yaml"), "f is a file: choose another"),
        (("copy", "personalise/lora", "a\0b"), "is no name of"),
        (("copy", "personalise/lora", LONG), "name of more than 220 bytes"),
        (("copy", "personalise/lora", "~nosuchuser/x"), "is no name of"),
        (("train", "personalise/lora", "train.steps=5", "train.warmup=6"), "warmup=6 is longer than steps=5"),
        (("train", "personalise/lora", "preview.seeds=[1, 1]"), "preview: seeds must differ"),
        (("demo", "--out", "f/x"), "f is a file: choose another"),
        (("demo", "--out", LONG), "name of more than 220 bytes"),
        (("demo", "out=elsewhere"), "out=elsewhere: the demo names its runs itself; its folder is --out"),
        (("score", LONG, "brightness"), "no folder"),
        (("score", "a\0b", "brightness"), "no folder"),
        (("score", "folder", "brightness", "--out", f"{LONG}.json"), "name of more than 220 bytes"),
    ],
)
def test_names_and_files_that_cannot_be(cli, tmp_path, unchanged, words, message):
    (tmp_path / "f").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "f.yaml").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    lines = "verb: train\nname: x\nadapter: lora\ndata: pocket/bumble\n"
    (tmp_path / "deep.yaml").write_text(f"{lines}train: {'[' * 1000}")
    (tmp_path / "date.yaml").write_text(f"{lines}description: 2024-13-45\n")
    (tmp_path / "digits.yaml").write_text(f"{lines}seed: {'9' * 5000}\n")
    (tmp_path / "extends.yaml").write_text("extends: {a: 1}\n")
    (tmp_path / "set.yaml").write_text(lines.replace("lora", "!!set {lora}"))
    (tmp_path / "hex.yaml").write_text(f"{lines}train: {{steps: 0x{'f' * 5000}}}\n")
    if "pipe.yaml" in words:
        os.mkfifo(tmp_path / "pipe.yaml")
        refused(cli(*words), message)
    else:
        with unchanged:
            refused(cli(*words), message)


@pytest.mark.parametrize("name", ["mps", "xpu", "xla", "hpu", "meta", "vulkan", "privateuseone", "cpu:3", "foo", ""])
def test_devices_that_are_not_there(cli, unchanged, tmp_path, name):
    (tmp_path / "p").mkdir()
    with unchanged:
        refused(cli("sample", "prompts=a", "out=o", f"device={name or chr(39) * 2}"), "device", "cpu")
        refused(cli("score", "p", "brightness", "--device", name), "--device", "cpu")
        refused(cli("train", "personalise/lora", f"train.device={name or chr(39) * 2}"), "train.device", "cpu")


@pytest.mark.parametrize("seeds", ["300000000", "100000000000000", "1000001", "500001"])
def test_more_pictures_than_a_folder_holds(cli, unchanged, seeds):
    with unchanged:
        refused(
            cli("sample", "prompts=[a, b]", "out=o", f"seeds={seeds}", "device=cpu"), "2 prompts and", "of one folder"
        )


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise KeyError('boom')", "KeyError: 'boom'"),
        ("raise SystemExit", "SystemExit"),
        ("exit(0)", "SystemExit: 0"),
        ("raise GeneratorExit", "GeneratorExit"),
    ],
)
def test_what_escapes_is_one_line_and_a_file(cli, monkeypatch, tmp_path, code, error):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("visiontune.cli.show.pages", lambda _: exec(code))
    result = cli("show", "oft")
    assert result.code == 1 and result.err.count("\n") == 1
    assert "this is a bug of visiontune or of code that it ran" in result.err
    file = Path(result.err.split()[-1])
    assert file.parent == tmp_path and file.read_text().startswith("Traceback") and error in file.read_text()


def test_too_little_memory_is_not_called_a_bug(cli, monkeypatch):
    def full(_: str) -> None:
        raise MemoryError

    monkeypatch.setattr("visiontune.cli.show.pages", full)
    refused(cli("show", "oft"), "memory does not suffice")
