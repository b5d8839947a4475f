"""A tiny model's folder, a folder of captioned images, and the command line called in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import save_tiny

from visiontune.cli.main import main
from visiontune.evaluation import kept


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch) -> Callable[..., Result]:
    """``cli("train", ...)`` in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Result:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny-sd")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three 16x16 images with captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a photo of a [trigger] circle")
    return folder


@pytest.fixture
def recipe(tmp_path, tiny_folder, photos) -> Path:
    """A recipe of two steps on the tiny model."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""verb: train
name: tiny
model: {tiny_folder}
adapter: {{name: lora, rank: 2}}
data: {{root: {photos}, class_noun: circle}}
train: {{steps: 2, batch_size: 1, checkpoint_every: 1, trackers: [], device: cpu}}
"""
    )
    return path


@pytest.fixture
def glance(monkeypatch) -> None:
    """Have a CLIP judge by three ordinary pictures of two steps, unless it is told more."""
    monkeypatch.setattr(kept, "Likeness", functools.partial(kept.Likeness, ordinary=3, steps=2, seeds=1))


@pytest.fixture
def unchanged(tmp_path):
    """Fails the test if it adds, changes or removes a file under the working folder."""

    def state() -> dict[Path, bytes | None]:
        return {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}

    class Watch:
        def __enter__(self) -> None:
            self.before = state()

        def __exit__(self, kind: object, *_: object) -> None:
            if kind is None:
                assert state() == self.before

    return Watch()
