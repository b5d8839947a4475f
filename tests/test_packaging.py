"""The wheel, built through the source distribution, works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from visiontune import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def files(folder: Path) -> set[str]:
    """Files under a folder of the checkout that belong to it."""
    found = (f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    return {name for name in found if "__pycache__" not in name}


def test_the_wheel_holds_the_package_and_the_catalogue(built):
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    assert {f"visiontune/{name}" for name in files(ROOT / "visiontune")} <= names
    for folder in ("pipelines", "rewards", "datasets"):
        assert {f"visiontune/_catalogue/{folder}/{name}" for name in files(ROOT / folder)} <= names
    assert {name.split("/")[0] for name in names} == {"visiontune", f"visiontune-{__version__}.dist-info"}
    assert f"visiontune-{__version__}.dist-info/licenses/LICENSE" in names


def test_the_source_distribution_holds_what_the_wheel_is_made_of(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile", "datasets/README.md"} <= names
    assert not any(name.startswith((".venv", "runs", "dist")) for name in names)


def test_the_installed_wheel_finds_its_catalogue(built, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = "import visiontune.catalogue as c; print(c.root()); print(*c.names('pipelines'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    root, names = done.stdout.splitlines()
    assert root == str(site / "visiontune/_catalogue")
    assert "personalise/oft" in names.split()
    command = [sys.executable, "-m", "visiontune", "show", "personalise/oft"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == (ROOT / "pipelines/personalise/oft.yaml").read_text().strip()


def test_shipped_models_do_not_say_where_they_were_made():
    said = [f for f in (ROOT / "visiontune" / "assets").rglob("*.json") if "_name_or_path" in f.read_text("utf-8")]
    assert not said
