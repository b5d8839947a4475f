"""Colour, brightness, JPEG size and diversity: numbers known in advance."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visiontune.errors import UserError
from visiontune.rewards.loading import load


def flat(*rgb: float, size: int = 8) -> torch.Tensor:
    return torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, size, size).clone()


NOISE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_brightness_is_luma() -> None:
    images = torch.cat([flat(1, 1, 1), flat(1, 0, 0), flat(0, 1, 0), flat(0, 0, 1)])
    expected = torch.tensor([1.0, 0.299, 0.587, 0.114])
    torch.testing.assert_close(load("brightness")(images, [""] * 4), expected)
    torch.testing.assert_close(load({"name": "brightness", "dark": True})(images, [""] * 4), 1 - expected)


def test_share_counts_pixels_of_the_colour_and_halves_where_the_formula_says() -> None:
    reward = load({"name": "color", "color": "0 0 1", "width": 0.2})
    half = flat(0, 0, 1)
    half[..., 4:] = flat(1, 1, 0)[..., 4:]
    near = flat(0, 0, 1 - 0.2 * math.sqrt(2 * math.log(2)))
    torch.testing.assert_close(reward(torch.cat([half, near]), ["", ""]), torch.tensor([0.5, 0.5]), atol=1e-4, rtol=0)


def test_named_colours_are_those_of_the_pocket_world() -> None:
    from visiontune.pocket.world import COLORS

    for name, rgb in COLORS.items():
        assert load({"name": "color", "color": name})(flat(*(v / 255 for v in rgb)), [""]).item() == pytest.approx(1)


def test_channel_is_the_mean_of_one_channel() -> None:
    reward = load({"name": "color", "color": "green", "measure": "channel"})
    torch.testing.assert_close(reward(NOISE, [""]), NOISE[:, 1].mean().view(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"color": "gren"}, "did you mean 'green'"),
        ({"color": "1 2 3"}, "three numbers in"),
        ({"color": "yellow", "measure": "channel"}, "red, green or blue"),
        ({"width": 0}, "width must be a number above 0"),
    ],
)
def test_bad_colours_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load({"name": "color", **options})


def test_jpeg_is_the_size_of_the_file_in_kilobytes() -> None:
    file = io.BytesIO()
    pixels = (NOISE[0].permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "jpeg", quality=95)
    small, large = load("jpeg-compressibility"), load("jpeg-incompressibility")
    assert large(NOISE, [""]).item() == pytest.approx(len(file.getvalue()) / 1000)
    torch.testing.assert_close(small(NOISE, [""]), -large(NOISE, [""]))
    white = torch.ones_like(NOISE)
    assert small(white, [""]) > small(NOISE, [""])
    assert load({"name": "jpeg", "quality": 20, "goal": "incompressible"})(NOISE, [""]) < large(NOISE, [""])
    with pytest.raises(UserError, match="from 1 to 95"):
        load({"name": "jpeg", "quality": 100})


def test_diversity_is_the_mean_distance_within_a_prompt() -> None:
    images = torch.cat([flat(0, 0, 0), flat(0.5, 0.5, 0.5), flat(1, 1, 1), flat(0.2, 0.2, 0.2), flat(0.2, 0.2, 0.2)])
    scores = load("diversity")(images, ["a", "a", "b", "b", "a"])
    # a: 0, 0.5, 0.2; b: 1, 0.2
    torch.testing.assert_close(scores, torch.tensor([0.35, 0.4, 0.8, 0.8, 0.25]))
    assert load("diversity")(images[3:], ["same", "same"]).tolist() == [0.0, 0.0]
    with pytest.raises(UserError, match="'b' has only one"):
        load("diversity")(images[:3], ["a", "a", "b"])


def test_diversity_in_clip_is_one_minus_the_cosine(clip_folder: Path) -> None:
    reward = load({"name": "diversity", "features": "clip", "model": str(clip_folder)})
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    features = reward.encoder.image_features(images)
    pairs = 1 - features @ features.T
    torch.testing.assert_close(reward(images, ["a"] * 3), pairs.sum(1) / 2, atol=1e-5, rtol=0)


def test_a_spec_a_module_a_yaml_file_and_a_python_file_all_load(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: color\noptions: {color: blue}\n")
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True, kw_only=True)\n"
        "class Config:\n    gain: float = 2.0\n"
        "def build(config):\n    return lambda images, prompts, meta: [config.gain] * len(images)\n"
    )
    blue = load({"name": "color", "color": "blue"})(NOISE, [""])
    torch.testing.assert_close(load(str(tmp_path / "mine.yaml"))(NOISE, [""]), blue)
    assert load({"name": str(tmp_path / "own.py"), "gain": 3})(NOISE, [""]).tolist() == [3.0]
    assert load("redness").name == "redness"
    torch.testing.assert_close(load({"name": "redness", "color": "blue"})(NOISE, [""]), blue)
    (tmp_path / "mine.yaml").write_text("options: 3\n")
    with pytest.raises(UserError, match="not a reward spec"):
        load(str(tmp_path / "mine.yaml"))
    with pytest.raises(UserError, match="did you mean 'brightness'"):
        load("brightnes")
