from __future__ import annotations

import pytest

from visiontune import plugin
from visiontune.errors import UserError
from visiontune.signals import Terminated, terminable

METHOD = """
from __future__ import annotations
from dataclasses import dataclass
from visiontune.schema import option

@dataclass(frozen=True, kw_only=True)
class Config:
    gain: float = option(1.0, help="a factor")

def build(config):
    return config.gain
"""


def test_names_are_the_methods_and_not_their_helpers():
    assert {"denoising", "dreambooth"} <= set(plugin.names("objectives"))
    assert {"base", "__init__"}.isdisjoint(plugin.names("objectives"))
    assert {"_vlm", "loading"}.isdisjoint(plugin.names("rewards"))


def test_a_method_is_a_file_with_a_config_that_is_no_base(tmp_path, monkeypatch):
    monkeypatch.setattr(plugin, "_PACKAGE", tmp_path)
    (tmp_path / "kind").mkdir()
    for name in ("good", "_private", "base"):
        (tmp_path / "kind" / f"{name}.py").write_text(METHOD)
    (tmp_path / "kind" / "alias.py").write_text("from other import Config as Other\nConfig = Other\n")
    (tmp_path / "kind" / "helper.py").write_text("class Configuration: ...\n")
    assert plugin.names("kind") == ["alias", "good"]
    for name in ("_private", "base", "helper", "nothing", "sub/good"):
        with pytest.raises(UserError, match=f"'{name}' is not one of the kind; "):
            plugin.load("kind", name)


@pytest.mark.parametrize("kind", ["adapters", "objectives", "rewards"])
def test_every_method_has_a_config_and_a_builder(kind):
    for name in plugin.names(kind):
        module = plugin.load(kind, name)
        assert module.__doc__ and module.Config.__doc__, name
        assert callable(module.build), name


def test_a_file_and_a_dotted_path_are_methods_too(tmp_path, monkeypatch):
    (tmp_path / "outside_method.py").write_text(METHOD)
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "outside_method.py"), "outside_method.py"):
        module, config = plugin.configure("rewards", {"name": name, "gain": "2"}, "reward")
        assert module.build(config) == 2.0
    package = tmp_path / "outside_package"
    package.mkdir()
    (package / "method.py").write_text(METHOD)
    module, config = plugin.configure("rewards", "outside_package.method", "reward")
    assert module.build(config) == 1.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dreambooht", "here.name: 'dreambooht' is not one of the objectives; did you mean 'dreambooth'?"),
        (
            {"name": "denoising", "snr_gama": 5},
            "here.snr_gama is not an option of denoising; did you mean 'snr_gamma'?",
        ),
        ({"name": "denoising", "snr_gamma": -1}, "here.snr_gamma must be a number above 0"),
        ({"snr_gamma": 5}, "here.name is missing"),
        (["denoising"], "here must be a name or a mapping"),
        ("no_such_package.method", "here.name: there is no module 'no_such_package'"),
        ("missing.py", "here.name: there is no file 'missing.py'"),
        ("visiontune.files", "here.name: 'visiontune.files' defines no Config"),
    ],
)
def test_what_is_wrong_is_said_with_the_path(spec, message):
    with pytest.raises(UserError) as error:
        plugin.configure("objectives", spec, "here")
    assert str(error.value).startswith(message)


def test_a_method_that_needs_another_package_names_it(tmp_path, monkeypatch):
    (tmp_path / "needy_method.py").write_text("import package_that_is_not_there")
    package = tmp_path / "needy"
    package.mkdir()
    (package / "method.py").write_text("import package_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    for name in ("needy.method", "needy_method.py"):
        with pytest.raises(UserError, match="package_that_is_not_there"):
            plugin.load("adapters", name)


def test_a_module_whose_config_is_no_set_of_options_is_not_called(tmp_path):
    file = tmp_path / "other.py"
    for body in (
        "def Config(**options): open('ran', 'w')\ndef build(config): ...",
        METHOD.replace("def build", "def make"),
    ):
        file.write_text(body)
        with pytest.raises(UserError, match="defines no Config"):
            plugin.configure("rewards", str(file), "reward")


HEAD = "from dataclasses import dataclass\n\n@dataclass\nclass Config: ...\n\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise RuntimeError('boom')", r"when it is imported, raised RuntimeError: boom \(mine.py, line 1\)"),
        ("exit()", r"when it is imported, called exit\(\) \(mine.py, line 1\)"),
        ("\n\ndef (:", r"raised SyntaxError: invalid syntax \(mine.py, line 3\)"),
        ("a = 1\0", r"raised SyntaxError: .*null bytes"),
        ("raise GeneratorExit", r"raised GeneratorExit \(mine.py, line 1\)"),
        (HEAD + "Config = Config()\ndef build(config): ...", "defines no Config"),
        (HEAD.replace("@dataclass\n", "") + "def build(config): ...", "defines no Config"),
        (HEAD, "defines no Config"),
        (HEAD + "build = 3", "defines no Config"),
        (HEAD.replace(" ...", "\n    a: 'Nope' = 1\n") + "def build(config): ...", "name 'Nope' is not defined"),
        (HEAD.replace(" ...", "\n    def __post_init__(self): 1 / 0") + "def build(config): ...", "line 5"),
        (
            HEAD + "def build(config):\n    raise ValueError('a\\nb')",
            r"build\(config\) raised ValueError: a b \(mine.py",
        ),
        (HEAD + "def build(config):\n    import sys\n    sys.exit('so')", r"called exit\(so\) \(mine.py, line 8\)"),
        (HEAD + "def build():\n    return 1", r"build\(\) takes 0 positional"),
        (HEAD + "def build(config):\n    return build(config)", "raised RecursionError"),
        (
            HEAD + "class E(Exception):\n    def __str__(self): 1 / 0\ndef build(config):\n    raise E",
            r"raised E \(mine",
        ),
    ],
)
def test_whatever_code_from_outside_raises_is_one_line(tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        module, config = plugin.configure("rewards", str(tmp_path / "mine.py"), "reward")
        plugin.build(module, config, "reward")
    assert "\n" not in str(error.value) and str(error.value).startswith("reward")


@pytest.mark.parametrize("name", [".foo", "...", "a..b", "a.b c", "a.1"])
def test_what_cannot_name_a_module_is_not_imported(name):
    with pytest.raises(UserError, match="is no name of a module"):
        plugin.load("rewards", name)


@pytest.mark.parametrize(
    ("signal", "error"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", Terminated)], ids=["Ctrl-C", "SIGTERM"]
)
def test_an_interruption_passes_through_code_from_outside(tmp_path, signal, error):
    (tmp_path / "mine.py").write_text(f"import signal\nsignal.raise_signal(signal.{signal})\n")
    with terminable(), pytest.raises(error):
        plugin.load("rewards", str(tmp_path / "mine.py"))


def test_our_own_code_raises_what_it_raises():
    with pytest.raises(ZeroDivisionError), plugin.guarded(plugin.load, "load"):
        1 / 0  # noqa: B018
