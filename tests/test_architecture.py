"""The shape of the project: who may import whom, what start-up costs, and what stands in the root folders."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from visiontune import catalogue

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "visiontune"

GROUND = {"errors", "quiet", "signals", "outside", "files", "ranges", "schema", "yaml_text", "plugin", "catalogue"}
LIBRARY = {"core", "diffusion", "models", "adapters", "guidance", "objectives", "rewards", "search", "data", "ops"}
# What a module, or the modules of a folder, may import from the package. A longer name wins over a shorter one.
MAY_IMPORT = {
    "errors": set(),
    "quiet": set(),
    "outside": {"errors"},
    "signals": {"errors"},
    "files": {"errors", "outside"},
    "ranges": {"errors"},
    "yaml_text": {"errors", "outside"},
    "schema": {"errors", "outside", "ranges", "yaml_text"},
    "plugin": {"errors", "signals", "outside", "schema"},
    "catalogue": {"errors", "outside", "schema", "yaml_text"},
    "core": {"errors", "files", "outside", "schema"},
    "ops": {"errors", "outside", "core"},
    "diffusion": {"errors", "files", "outside", "schema", "core"},
    "models": {"errors", "files", "outside", "schema", "core", "ops", "diffusion"},
    "adapters": {"errors", "files", "outside", "schema", "plugin", "core", "ops"},
    "guidance": {"errors", "files", "outside", "schema", "plugin", "core", "ops", "diffusion", "models", "adapters"}
    | {"rewards", "data.pictures", "data.numbered"},
    "weights": {"errors", "files", "outside", "core", "ops", "adapters"},
    "pocket": {"errors", "files", "outside", "schema", "core"},
    "rewards": GROUND | {"core", "ops", "models.clip", "models.sources", "pocket", "data.pictures"},
    "composition": {"errors", "data.pictures"},
    **{
        f"composition.{name}": {"errors", "core", "diffusion", "models", "guidance"}
        for name in ("freecompose", "_delta", "_keys")
    },
    "data": {"errors", "files", "outside", "schema", "catalogue", "core", "ops", "pocket"},
    "search": {"errors", "schema", "plugin", "core", "ops", "diffusion", "models", "guidance", "rewards"},
    "objectives": {"errors", "files", "outside", "schema", "plugin", "core", "ops", "diffusion", "models.base", "data"}
    | {"guidance", "models.clip", "models.contrastive", "models.words"},
    "sampling": GROUND | LIBRARY - {"objectives", "rewards"} | {"pocket", "rewards.base"},
    "training": GROUND | LIBRARY - {"rewards"} | {"sampling"},
    "evaluation": GROUND | LIBRARY - {"objectives"} | {"pocket", "sampling", "training"},
    "view": {"errors", "files", "outside", "yaml_text", "data.pictures", "guidance.stack", "sampling.manifest"}
    | {"sampling.shards"}
    | {"training.guards", "training.home", "training.preview"},
    "config": GROUND | LIBRARY | {"sampling", "training"},
    "assemble": GROUND | LIBRARY | {"weights", "sampling", "training", "evaluation", "config"},
    "estimate": GROUND | LIBRARY | {"sampling", "training", "config", "assemble"},
    "fit": {"errors", "config", "estimate"},
    "demo": GROUND | LIBRARY | {"pocket", "sampling", "training", "evaluation", "config", "assemble"},
    "cli": GROUND
    | LIBRARY
    | {
        "weights",
        "sampling",
        "training",
        "evaluation",
        "config",
        "assemble",
        "estimate",
        "fit",
        "demo",
        "view",
        "__version__",
    },
    "__main__": {"cli"},
    "__init__": {"errors"},
}
# Nothing here may cost the import of torch and its like before it is asked for.
LIGHT = {*GROUND, "__init__", "config", "assemble", "cli", "data.base", "training.config", "sampling.config"}
HEAVY = {"torch", "torchvision", "numpy", "scipy", "PIL", "diffusers", "transformers", "accelerate", "datasets"}


FILES = sorted(f for f in PACKAGE.rglob("*.py") if "_catalogue" not in f.parts)


@functools.cache
def modules() -> list[tuple[str, ast.Module]]:
    """Every module's name within the package and its syntax tree."""
    return [(_name(f), ast.parse(f.read_text(encoding="utf-8"))) for f in FILES]


def _name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(node: ast.AST, lazy: bool = True) -> Iterator[str]:
    """Modules that ``node`` imports when it runs (not for type checkers); ``lazy``: inside functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child, lazy)


def _within(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def violations(name: str, tree: ast.Module) -> list[str]:
    """Imports of the package that the module ``name`` may not have."""
    parts = name.split(".")
    rule = next(".".join(parts[:n]) for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in MAY_IMPORT)
    own = parts[0] if (PACKAGE / parts[0]).is_dir() else name
    used = {i.removeprefix("visiontune.") for i in imports(tree) if i.startswith("visiontune.")}
    return sorted(f"{name} -> {i}" for i in used if not _within(i, MAY_IMPORT[rule] | {own}))


def test_every_module_has_a_rule():
    assert {name.split(".")[0] for name, _ in modules()} - {"assets"} <= MAY_IMPORT.keys()


def test_imports_follow_the_dependency_direction():
    assert [v for name, tree in modules() for v in violations(name, tree)] == []


def test_the_check_sees_a_wrong_import():
    assert violations("core", ast.parse("def f():\n    from visiontune.models import load")) == ["core -> models.load"]
    assert violations("adapters.x", ast.parse("import visiontune.cli.main")) == ["adapters.x -> cli.main"]
    assert violations("objectives.x", ast.parse("from visiontune.models.sd import A")) == [
        "objectives.x -> models.sd.A"
    ]
    typing_only = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from visiontune.cli import main"
    assert violations("core", ast.parse(typing_only)) == []


def test_light_modules_import_nothing_heavy_at_the_top():
    heavy = {
        f"{name} -> {i}"
        for name, tree in modules()
        if _within(name, LIGHT)
        for i in imports(tree, lazy=False)
        if i.split(".")[0] in HEAVY
    }
    assert heavy == set()


def _run(code: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, env=environment, **options)


def test_importing_the_package_and_reading_a_recipe_costs_no_torch(tmp_path):
    code = "import sys, visiontune, visiontune.config, visiontune.cli.main as m; m.parser(); print(*sys.modules)"
    loaded = set(_run(["-c", code], cwd=tmp_path).stdout.split())
    assert "visiontune.cli.demo" in loaded
    assert not loaded & HEAVY


def test_help_takes_less_than_half_a_second():
    """In processor time, which a busy machine does not change."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert _run(["-m", "visiontune", "--help"], cwd=ROOT).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_the_public_names_are_the_real_ones():
    import visiontune

    for name in visiontune.__all__:
        assert getattr(visiontune, name).__module__.startswith("visiontune"), name
        assert name in dir(visiontune)
    assert visiontune.__version__ == "0.2.0"
    with pytest.raises(AttributeError, match="atach"):
        _ = visiontune.atach


def test_datasets_is_hugging_face_from_the_root_too():
    """A package of ours in the folder ``datasets`` would stand before the library, and transformers would break."""
    found = _run(["-c", "import importlib.util as u; print(u.find_spec('datasets').origin)"], cwd=ROOT)
    assert found.stdout.strip().endswith("-packages/datasets/__init__.py"), found


@pytest.mark.parametrize("folder", [*catalogue.KINDS, "samples", "benchmarks", "docs", "tests"])
def test_root_folders_are_not_packages(folder):
    assert list((ROOT / folder).rglob("__init__.py")) == []


def test_tests_mirror_the_package():
    """A folder of tests is a folder of the package, or belongs to no module: contracts, and the families' pipelines."""
    folders = {f.name for f in (ROOT / "tests").iterdir() if f.is_dir() and list(f.glob("*.py"))}
    assert folders - {"contracts", "benchmarks", "families"} <= {f.name for f in PACKAGE.iterdir() if f.is_dir()}


@pytest.mark.parametrize("name", [n for n in map(_name, FILES) if not n.startswith(("assets", "__main__"))])
def test_every_module_imports_and_says_what_it_is(name):
    module = importlib.import_module(f"visiontune.{name}" if name != "__init__" else "visiontune")
    empty_package = not Path(str(module.__file__)).read_text(encoding="utf-8").strip()
    assert module.__doc__ or empty_package
