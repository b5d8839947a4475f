"""The script that trains pocket-clip: its families of scenes, what is true of them, and its path through the model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from visiontune.data import oracle
from visiontune.data.pocket_scenes import caption
from visiontune.data.pocket_world import SHAPES, SUBJECTS, render
from visiontune.evaluation.attributes import meaning


@pytest.fixture(scope="module")
def script() -> ModuleType:
    folder = str(Path(__file__).parents[2] / "pipelines" / "pretrain")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("clip")
    finally:
        sys.path.remove(folder)


def test_a_family_is_of_scenes_of_different_meaning_in_layouts_of_their_own(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scenes = script.family(rng)
        assert len({meaning(s) for s in scenes}) == len(scenes) == script.FAMILY
        assert len({s.things[0].x for s in scenes}) == script.FAMILY
        for scene in scenes:
            assert not any(
                {t.color, t.accent} == {s.color, s.accent} and (t.shape == s.shape or t.pattern == s.pattern)
                for t in scene.things
                for s in SUBJECTS.values()
            )
            if not any(t.accent for t in scene.things):  # the oracle reads captions of one colour an object
                assert oracle.matches(render(scene), caption(scene, rng, 1.0))


def test_truth_says_which_captions_fit_which_pictures(script: ModuleType, tmp_path: Path) -> None:
    scenes = script.Scenes(tmp_path, 40)
    rows = np.arange(40)
    for detail in (0.0, 1.0):
        texts = [caption(s, np.random.default_rng(1), detail) for s in scenes.scenes]
        truth = scenes.truth(rows, texts)
        assert truth.diagonal().all()
        plain = [i for i in rows if not any(t.accent for t in scenes.scenes[i].things)]
        for i in plain:
            for j in plain:
                one, other = scenes.scenes[i], scenes.scenes[j]
                same_ground = detail == 0 or (one.tone, one.texture) == (other.tone, other.texture)
                if one.relation == other.relation:  # the oracle takes one of two relations for true that are both near
                    assert bool(truth[i, j]) == (same_ground and oracle.matches(scenes.pictures[i], texts[j]))
    again = script.Scenes(tmp_path, 40)
    assert np.array_equal(again.pictures, scenes.pictures)
    assert np.array_equal(scenes.pictures[3], render(scenes.scenes[3]))


def test_patches_say_what_stands_where(script: ModuleType) -> None:
    scene = script.family(np.random.default_rng(3))[0]
    thing = scene.things[0]
    picture = render(scene)
    seen = script.patches([scene], picture[None])
    patch = int(thing.y // 8) * 8 + int(thing.x // 8)
    assert SHAPES[int(seen.shape[0, patch])] == thing.shape
    x, y = patch % 8 * 8 + 4, patch // 8 * 8 + 4
    expected = [(thing.x - x) / 16, (thing.y - y) / 16, (thing.radius - 11) / 4]
    assert seen.place[0, patch].tolist() == pytest.approx(expected, abs=1e-5)
    assert int(seen.mask.sum()) == int((np.ptp(picture, axis=-1) > oracle.CHROMA_THRESHOLD).sum())
    assert seen.mask[0, patch].mean() > 0.8
    bare = int((seen.shape[0] == script.NOTHING).nonzero()[0])
    few = seen.of(torch.tensor([[patch, bare]]))
    assert torch.equal(few.place[0, 0], seen.place[0, patch]) and torch.equal(few.mask[0, 1], seen.mask[0, bare])


def test_patches_of_objects_are_kept_first(script: ModuleType) -> None:
    shape = torch.full((2, 64), script.NOTHING)
    shape[0, 5:15] = 0
    index = script.kept(shape, 20, torch.Generator().manual_seed(0))
    assert set(range(5, 15)) <= set(index[0].tolist())
    assert all(len(set(row.tolist())) == 20 for row in index)


def test_the_path_over_all_patches_is_the_models_own(script: ModuleType) -> None:
    torch.manual_seed(0)
    clip = script.build(50, 49).eval()
    model = script.WithHeads(clip)
    pixels, ids = torch.randn(3, 3, 64, 64), torch.tensor([[48, 1, 2, 49], [48, 3, 49, 49], [48, 4, 5, 49]])
    index = torch.stack([torch.randperm(64) for _ in range(3)])  # any order: positions go with their patches
    with torch.no_grad():
        ours = model.logits(model.see(pixels, index)[-1], ids)
        theirs = clip(input_ids=ids, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_contrast_counts_every_right_answer(script: ModuleType) -> None:
    truth = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    sure = torch.where(truth, 20.0, 0.0)
    expected = (2 * np.log(2) + 0) / 3  # the two that are true of each other share the probability
    assert float(script.contrast(sure, truth)) == pytest.approx(expected, abs=1e-6)
    assert float(script.contrast(-sure, truth)) > 10
