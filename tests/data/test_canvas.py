"""Canvases of two panels: what a model is shown on the left, what it paints on the right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visiontune.data import canvas
from visiontune.data.base import Config, Sample, Source
from visiontune.data.readers import left_out
from visiontune.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def flat(color, size=(24, 16)):
    return Image.new("RGB", size, color)


def sample(left=RED, right=BLUE, size=(24, 16)):
    sources = {"image": Source(lambda: flat(right)), "source": Source(lambda: flat(left, size))}
    return Sample(id="a", sources=sources, caption="paint it blue")


def test_the_source_is_on_the_left_and_the_right_is_painted():
    made = canvas.on_canvas(sample())
    assert list(made.sources) == ["image", "region"] and made.caption == "paint it blue"
    picture, region = (np.asarray(made.sources[name].open()) for name in ("image", "region"))
    assert picture.shape == (16, 48, 3) and region.shape == (16, 48)
    assert (picture[:, :24] == RED).all() and (picture[:, 24:] == BLUE).all()
    assert not region[:, :24].any() and (region[:, 24:] == 255).all()


def test_a_source_of_another_shape_keeps_it_on_grey():
    picture = np.asarray(canvas.on_canvas(sample(size=(8, 16))).sources["image"].open())
    assert picture.shape == (16, 48, 3)
    assert (picture[:, 8:16] == RED).all() and (picture[:, :8] == 128).all() and (picture[:, 16:24] == 128).all()


def test_what_is_not_painted_yet_is_grey():
    picture = np.asarray(canvas.blank(flat(RED), (10, 20)))
    assert picture.shape == (20, 20, 3) and (picture[:, 10:] == 128).all() and (picture[10, 2] == RED).all()


@pytest.mark.parametrize("moving", [{"flip": True}, {"crop": "random", "cache": False}, {"box": True}])
def test_what_would_move_the_panels_is_refused(moving):
    with pytest.raises(UserError, match="panels in fixed places"):
        Config(root="x", canvas=True, **moving)


def test_the_folder_of_sources_is_no_leftover(tmp_path: Path):
    (tmp_path / "source").mkdir()
    for place in (tmp_path, tmp_path / "source"):
        flat(RED).save(place / "a.png")
    config = Config(root=str(tmp_path), canvas=True)
    assert not left_out(config, ["image", "region"])
    assert left_out(dataclasses.replace(config, canvas=False, ignore="source"), ["image"])
