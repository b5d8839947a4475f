"""The oracle as a reward agrees with the scenes that were drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from visiontune import plugin
from visiontune.errors import UserError
from visiontune.ops.pixels import to_tensor
from visiontune.pocket import oracle, scenes, world


def _reward(**options: object):
    module, config = plugin.configure("rewards", {"name": "oracle", **options}, "reward")
    return module.build(config)


def _subject(name: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return world.render(scenes.subject_scene(world.SUBJECTS[name], rng))


def test_own_prompts_score_one_and_foreign_ones_zero() -> None:
    pairs = list(itertools.islice(scenes.stream(5, "one"), 12))
    images = to_tensor(np.stack([world.render(scene) for scene, _ in pairs]))
    assert _reward()(images, [text for _, text in pairs]).mean() > 0.9
    wrong = ["three red stars"] * len(pairs)
    assert _reward()(images, wrong).tolist() == [0.0] * len(pairs)


def test_subject_likeness_is_the_oracles_own_number() -> None:
    pictures = np.stack([_subject("bumble"), _subject("domino")])
    scores = _reward(subject="bumble")(to_tensor(pictures), ["ignored", ""])
    expected = [oracle.subject_fidelity(p, world.SUBJECTS["bumble"]) for p in pictures]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32))
    assert scores[0] > 0.8 > scores[1]


def test_user_errors() -> None:
    with pytest.raises(UserError, match="did you mean 'bumble'"):
        _reward(subject="bumbel")
    with pytest.raises(UserError, match="64x64 pixels, not 32x16"):
        _reward()(torch.zeros(1, 3, 16, 32), ["a red circle"])
    with pytest.raises(UserError, match="names no object"):
        _reward()(torch.zeros(1, 3, 64, 64), ["a photo of a dog"])
