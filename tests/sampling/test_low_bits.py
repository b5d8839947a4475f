"""Pictures of a model in few bits: what a file says is drawn, and beside adapters it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import save_tiny

from visiontune import models
from visiontune.errors import UserError
from visiontune.models.low_bits import Bits
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.generate import generate
from visiontune.training.quest import quantised, trajectories


def test_a_file_of_few_bits_is_drawn_with(tmp_path):
    folder = save_tiny(tmp_path / "tiny-sd")
    made = models.load(str(folder))
    low = quantised(made, Bits(weights=3, inputs=4), trajectories(made, ["a red circle"], 2, 4.0, 0))
    file = low.save(tmp_path / "low.safetensors")
    drawn = {}
    for name, given in (("full", None), ("few", str(file))):
        options = {"prompts": ["a red circle"], "seeds": [0], "steps": 2, "device": "cpu", "sheet": 0}
        generate(SampleConfig(model=str(folder), low_bits=given, out=str(tmp_path / name), **options))
        drawn[name] = np.array(Image.open(next((tmp_path / name).glob("0*.png")))).astype(int)
    assert np.abs(drawn["full"] - drawn["few"]).max() > 2
    row = json.loads(Path(tmp_path / "few" / "manifest.jsonl").read_text().splitlines()[0])
    assert len(row["settings"]["low_bits"]) == 16
    with pytest.raises(UserError, match="low_bits is of a whole model, and adapters would not be rounded"):
        SampleConfig(prompts=["a"], low_bits="a", adapter="b")
    with pytest.raises(UserError, match="model of few bits"):
        generate(SampleConfig(model=str(folder), low_bits="nowhere", prompts=["a"], out=str(tmp_path / "other")))
