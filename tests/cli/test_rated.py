"""Ratings from the recipe to pictures: told in training, asked for in sampling, kept in files, folded in by a merge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from visiontune import adapters

SAMPLE = ["sample", "prompts=[a red circle]", "seeds=[0]", "steps=1", "device=cpu", "sheet=0"]


@pytest.fixture
def rated(photos):
    for file in photos.glob("*.txt"):
        file.unlink()
    lines = [{"file_name": f"{i}.png", "text": "a circle", "quality": i} for i in range(3)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return ["data.scores={quality: [0, 2]}", "objective=denoising", "preview.prompts=[]", "train.lr=0.1"]


def picture(out: str) -> np.ndarray:
    return np.array(Image.open(next(Path(out).glob("0*.png")))).astype(float)


def test_ratings_are_trained_asked_for_continued_and_merged(cli, recipe, rated):
    result = cli("train", recipe, *rated)
    assert result.code == 0, result.err
    header = adapters.read_header("runs/tiny/adapter.safetensors")
    assert header["scores"] == {"quality": [0, 2]}
    assert header["whole"] == [f"unet.time_embedding.scores.{own}" for own in ("hidden", "out")]
    grid = cli(*SAMPLE, "adapter=runs/tiny", "grid={scores: [{quality: 0}, {quality: 2}, {quality: null}]}")
    assert grid.code == 0, grid.err
    assert cli(*SAMPLE, "adapter=runs/tiny", "out=runs/best").code == 0
    worst, best, untold = (
        np.array(Image.open(f)).astype(float) for f in sorted(Path("runs/samples").glob("s[0-9]*.png"))
    )
    assert np.array_equal(picture("runs/best"), best) and not np.array_equal(worst, best)
    assert not np.array_equal(untold, best)
    wrong = cli(*SAMPLE, "adapter=runs/tiny", "scores={quality: 3}", "out=runs/other")
    assert wrong.code == 2 and "scores: 'quality' is a number from 0 to 2, not 3" in wrong.err
    strange = cli(*SAMPLE, "scores={quality: 3}", "model=pocket/sd", "out=runs/other")
    assert strange.code == 2 and "scores.quality: no adapter here was told ratings" in strange.err
    assert cli("export", "runs/tiny", "lora.safetensors").code == 2
    merged = cli("export", "runs/tiny", "merged", "--format", "merged", "--dtype", "fp32")
    assert merged.code == 0 and "draws the best by quality" in merged.out
    assert cli(*SAMPLE, "model=merged", "out=runs/merged").code == 0
    np.testing.assert_allclose(picture("runs/merged"), best, atol=1)
    again = cli("train", recipe, *rated, "name=again", "adapter.start=runs/tiny/adapter.safetensors")
    assert again.code == 0, again.err
    other = cli("train", recipe, *rated[1:], "name=b", "adapter.start=runs/tiny/adapter.safetensors")
    assert other.code == 2 and "set data.scores to it" in other.err


def test_a_whole_model_that_learns_to_edit_with_ratings_is_written_drawing_the_best(cli, recipe, rated, photos, caplog):
    (photos / "source").mkdir()
    for file in [*photos.glob("*.png")]:
        Image.open(file).rotate(90).save(photos / "source" / file.name)
    options = ["model.expand=edit", "adapter=none", "train.lr=0.01", "train.ema=0.5"]
    result = cli("train", recipe, *rated, *options)
    assert result.code == 0, result.err
    assert "the model that is written draws the best" in caplog.text
    picture_of = ["pictures=photos/source/0.png", "model=runs/tiny/model", "out=runs/edited"]
    assert cli(*SAMPLE, *picture_of).code == 0
    assert not any("scores" in key for key in load_file("runs/tiny/model/unet/diffusion_pytorch_model.safetensors"))


def test_what_tells_no_ratings_is_refused(cli, recipe, rated):
    online = cli("train", recipe, *rated, "objective={name: consistency, updates: 1}")
    assert online.code == 2 and "and not by objective=consistency: take objective=denoising" in online.err
