"""`sample` with a reward among its guidance, and another one that judges."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model

from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.ops.pixels import to_tensor
from visiontune.rewards.loading import load
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.generate import generate
from visiontune.sampling.pipeline import images
from visiontune.schema import from_mapping

PROMPTS = ["a red circle", "a blue square", "a green triangle"]
GUIDANCE = [{"cfg": 2}, {"reward": {"reward": "brightness", "scale": 100}}]
DRAWING = {"steps": 2, "batch_size": 2}


def config(out, **options):
    given = {"model": "unused", "out": str(out), "prompts": PROMPTS, "device": "cpu", "guidance": GUIDANCE, **DRAWING}
    return from_mapping(SampleConfig, {**given, "held_out": "jpeg", **options})


def test_each_picture_is_judged_beside_the_one_without_the_term(tmp_path):
    model, said = tiny_model("sd"), []
    generate(config(tmp_path), model, say=said.append)
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    plain = images(model, PROMPTS, 0, guidance=GuidanceStack.of(GUIDANCE[:1]), **DRAWING)
    for row, before in zip(rows, plain, strict=True):
        with Image.open(tmp_path / row["file"]) as picture:
            both = [before, np.array(picture)]
        assert (both[0] != both[1]).any()
        for name, by in (("reward", "brightness"), ("held_out", "jpeg")):
            expected = [float(load(by)(to_tensor(one[None]), [row["prompt"]])) for one in both]
            assert row["guided"][name] == pytest.approx(expected, abs=1e-5)
        assert row["guided"]["reward"][1] > row["guided"]["reward"][0]
    gain = [np.mean([row["guided"]["reward"][side] for row in rows]) for side in (0, 1)]
    assert said[0] == f"reward guided by: {gain[0]:.4g} without it, {gain[1]:.4g} with it, mean of 3 pictures"
    assert said[1].startswith("reward held out: -") and len(said) == 2


def test_a_reward_that_guides_unjudged_is_told(tmp_path, caplog):
    generate(config(tmp_path, held_out=None, prompts=PROMPTS[:1]), tiny_model("sd"))
    assert "guidance by 'brightness' alone" in caplog.text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"guidance": [{"cfg": 2}]}, "judges pictures that a reward guides"),
        ({"guidance": None}, "judges pictures that a reward guides"),
        ({"held_out": "brightness"}, "the reward that guides"),
        ({"search": {"best_of": 2, "reward": "brightness"}}, "search.held_out"),
        ({"held_out": "brightnes"}, "did you mean 'brightness'"),
    ],
)
def test_nothing_to_judge_is_refused_before_a_model_is_opened(tmp_path, options, told):
    with pytest.raises(UserError, match=told):
        generate(config(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
