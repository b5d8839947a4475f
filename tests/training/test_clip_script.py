"""The script that trains pocket-clip: its families of scenes, what is true of them, and its path through the model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from visiontune.evaluation.attributes import meaning
from visiontune.pocket import oracle
from visiontune.pocket.scenes import caption, held_out
from visiontune.pocket.world import COLORS, SHAPES, SUBJECTS, Scene, Thing, render


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


def test_facts_are_sides_and_sizes_of_two_and_none_without_a_relation(script: ModuleType) -> None:
    star = Thing(shape="star", color="red", x=0, y=0, radius=9)
    heart = Thing(shape="heart", color="blue", x=0, y=0, radius=13)
    sides, sizes = script.facts(Scene(things=(star, heart), relation="above"))
    first, second = sides.view(2, -1, 2)
    rows = {name: i for i, name in enumerate((*SHAPES, *COLORS))}
    assert first[rows["star"]].tolist() == [0, -1] == first[rows["red"]].tolist()
    assert second[rows["heart"]].tolist() == [0, 1] == second[rows["blue"]].tolist()
    assert int((first != 0).sum()) == int((second != 0).sum()) == 2
    assert {name: sizes[0, i].item() for name, i in rows.items() if sizes[0, i]} == {"star": -1, "red": -1}
    assert {name: sizes[1, i].item() for name, i in rows.items() if sizes[1, i]} == {"heart": 1, "blue": 1}
    mirrored, swapped = script.facts(Scene(things=(heart, star), relation="below"))
    assert torch.equal(mirrored, sides.flip(0)) and torch.equal(swapped, sizes.flip(0))
    assert not any(fact.any() for fact in script.facts(Scene(things=(star, heart))))


def test_a_fact_is_known_where_the_words_before_have_told_it(script: ModuleType) -> None:
    relations, shapes = torch.tensor([10, 11]), torch.tensor([20, 21])
    ids = torch.tensor([[1, 20, 10, 5, 21, 9], [1, 20, 21, 5, 20, 9]])
    assert script.side_heard(ids, relations, shapes).tolist() == [[2, 2, 0, 2, 1, 2], [2, 2, 2, 2, 2, 2]]
    assert script.size_heard(ids, shapes).tolist() == [[2, 0, 2, 2, 1, 2], [2, 0, 1, 2, 2, 2]]


def test_a_reader_reads_each_object_where_it_is_known(script: ModuleType) -> None:
    reader = script.Reader(5)
    for head in (reader.whole, reader.patch, reader.word):
        torch.nn.init.zeros_(head.bias)
    facts = torch.zeros(2, 2, 5)
    facts[0, 0, 3], facts[0, 1, 1] = 1.0, -2.0
    own, heard = torch.tensor([[0, 1, 2], [2, 2, 2]]), torch.tensor([[2, 0], [2, 2]])
    states = torch.ones(2, 3, script.WIDTH)
    seen, told = (states[:, 0], states), (states[:, 0], states[:, :2])

    def losses(facts: torch.Tensor, said: list[bool]) -> dict[str, float]:
        read = reader(seen, told, own, heard, facts, torch.tensor(said))
        return {name: value.item() for name, value in read.items()}

    assert losses(facts, [True, True]) == {"picture": 5.0, "caption": 5.0, "patch": 2.5, "word": 1.0}
    assert losses(facts, [False, True]) == {"picture": 5.0, "caption": 0.0, "patch": 2.5, "word": 0.0}
    assert not any(losses(facts * 0, [True, True]).values())  # a batch without relations teaches nothing, and is no NaN


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
        image, text, _ = model.features(model.see(pixels, index)[-1], ids)
        ours = clip.logit_scale.exp() * image @ text.T
        theirs = clip(input_ids=ids, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_contrast_counts_every_right_answer(script: ModuleType) -> None:
    truth = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    sure = torch.where(truth, 20.0, 0.0)
    expected = (2 * np.log(2) + 0) / 3  # the two that are true of each other share the probability
    assert float(script.contrast(sure, truth)) == pytest.approx(expected, abs=1e-6)
    assert float(script.contrast(-sure, truth)) > 10
    # A text that fits no picture is one more wrong answer from pictures to texts, and asks for none itself.
    more = torch.cat([sure, torch.full((3, 1), 20.0)], 1)
    none = torch.cat([truth, torch.zeros(3, 1, dtype=torch.bool)], 1)
    forth = (2 * np.log(3) + np.log(2)) / 3
    assert float(script.contrast(more, none)) == pytest.approx((forth + expected) / 2, abs=1e-6)
    assert float(script.contrast(torch.cat([sure, -more[:, 3:]], 1), none)) == pytest.approx(expected, abs=1e-6)


def test_a_wrong_caption_is_known_to_fit_where_it_does(script: ModuleType, tmp_path: Path) -> None:
    scenes, rng = script.Scenes(tmp_path, 40), np.random.default_rng(0)
    rows = np.arange(40)
    others, texts = zip(*(script.wrong(s, rng) for s in scenes.scenes), strict=True)
    assert not any(map(held_out, texts))
    fits = scenes.fits(rows, others)
    for i, scene in enumerate(scenes.scenes):
        assert fits[i].tolist() == [meaning(scene) == meaning(other) for other in others]
    assert fits.any() and not fits.diagonal().all()
