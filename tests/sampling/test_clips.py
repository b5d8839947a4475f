"""Clips as files: animated, whole and lossless, in sheets by a frame, in the manifest like pictures."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from tiny_video import FRAMES, TinyVideo

from visiontune.data import pictures
from visiontune.errors import UserError
from visiontune.evaluation.score import score
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.generate import generate
from visiontune.sampling.grid import grid
from visiontune.sampling.pipeline import images
from visiontune.sampling.writer import write_image


def clip(frames: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 12, 20, 3), dtype=np.uint8)


def still(frames: int = 4) -> np.ndarray:
    return np.repeat(clip(1), frames, 0)


def stepping() -> np.ndarray:
    """Of some frames nothing changes, of others a pixel."""
    made = np.zeros((6, 12, 20, 3), np.uint8)
    made[2:, 3, 4] = 255
    made[4:, 9, 1] = (1, 2, 3)
    return made


@pytest.mark.parametrize("made", [clip(), still(), stepping(), clip(1), clip(2)], ids=len)
def test_every_frame_comes_back_to_the_bit(made, tmp_path):
    path = tmp_path / "a.png"
    assert write_image(path, made) == hashlib.sha256(path.read_bytes()).hexdigest()
    with Image.open(path) as read:
        assert read.format == "PNG" and read.n_frames == len(made)
        assert len(made) == 1 or read.info["loop"] == 0
    found = pictures.frames(path)
    np.testing.assert_array_equal(found, made if len(made) > 1 else made[0])


def test_a_picture_is_read_as_one(tmp_path):
    write_image(tmp_path / "a.png", clip(1)[0])
    assert pictures.frames(tmp_path / "a.png").shape == (12, 20, 3)


def test_clips_are_not_written_as_webp(tmp_path):
    with pytest.raises(UserError, match="animated png, not as webp: set format=png"):
        write_image(tmp_path / "a.webp", clip())
    assert not list(tmp_path.iterdir())


def test_a_grid_shows_the_middle_frame_of_arrays_and_files(tmp_path):
    made = clip()
    write_image(tmp_path / "a.png", made)
    expected = np.asarray(grid([made[2]], 1))
    for shown in (made, tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(np.asarray(grid([shown], 1)), expected)


def test_a_model_of_clips_is_sampled_into_a_folder(tmp_path):
    config = SampleConfig(prompts=["a red circle", "a blue square"], seeds=2, steps=2, out=str(tmp_path), device="cpu")
    model = TinyVideo()
    rows = [json.loads(line) for line in generate(config, model).read_text().splitlines()]
    assert [row["file"] for row in rows] == [f"0000{i}_seed{seed}.png" for i in range(2) for seed in range(2)]
    drawn = images(model, [row["prompt"] for row in rows], [row["seed"] for row in rows], steps=2)
    assert drawn.shape == (4, FRAMES, 16, 16, 3) and drawn.dtype == np.uint8
    for row, expected in zip(rows, drawn, strict=True):
        np.testing.assert_array_equal(pictures.frames(tmp_path / row["file"]), expected)
        assert row["sha256"] == hashlib.sha256((tmp_path / row["file"]).read_bytes()).hexdigest()
    middle = [frames[FRAMES // 2] for frames in drawn]
    captions = {"row_captions": ["a red circle", "a blue square"], "column_captions": ["seed 0", "seed 1"]}
    sheet = np.asarray(grid(middle, 2, **captions))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), sheet)


def test_a_run_that_stopped_goes_on_and_webp_is_refused(tmp_path):
    options = {"prompts": ["a red circle"], "seeds": 2, "steps": 2, "out": str(tmp_path), "device": "cpu"}
    generate(SampleConfig(**options), TinyVideo())
    before = (tmp_path / "00000_seed1.png").read_bytes()
    (tmp_path / "00000_seed1.png").unlink()
    generate(SampleConfig(**options), TinyVideo())
    assert (tmp_path / "00000_seed1.png").read_bytes() == before
    with pytest.raises(UserError, match="set format=png"):
        generate(SampleConfig(**{**options, "out": str(tmp_path / "other"), "format": "webp"}), TinyVideo())


def test_scores_of_pictures_leave_clips_out_by_name(tmp_path):
    write_image(tmp_path / "a.png", clip())
    write_image(tmp_path / "b.png", clip(1)[0])
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("a red circle")
    found = score(tmp_path, ["brightness"])
    assert [row["brightness"] is None for row in found.rows()] == [True, False]
    assert "a.png is a clip of 5 frames, and what is scored here are pictures" in " ".join(found.complaints())
