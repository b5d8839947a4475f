"""The protocol that judges personalisation: which prompts it asks, and that it tells a learnt subject from none."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from visiontune.evaluation import personalise
from visiontune.pocket import oracle
from visiontune.pocket.scenes import held_out, subject_scene
from visiontune.pocket.world import RADII, SUBJECTS, Scene, Thing, render


def test_ordinary_prompts_are_held_out_and_have_one_and_two_objects_by_turns():
    prompts = personalise.ordinary_prompts(20)
    assert len(set(prompts)) == 20 and all(map(held_out, prompts))
    assert [len(oracle.read_caption(p).things) for p in prompts] == [1, 2] * 10


@pytest.mark.parametrize("name", SUBJECTS)
def test_subject_prompts_name_the_trigger_and_the_class_and_class_prompts_a_colour(name):
    subject = SUBJECTS[name]
    for prompt in personalise.subject_prompts(subject, "sks"):
        assert f"sks {subject.shape}" in prompt
    for prompt in personalise.class_prompts(subject):
        (thing,) = oracle.read_caption(prompt).things
        assert thing.shape == subject.shape and thing.color


class FakeClip:
    """Mean colours as features."""


@pytest.mark.parametrize("learnt", [False, True])
def test_a_model_that_draws_the_subject_scores_high_and_one_that_does_not_low(monkeypatch, learnt):
    """The sampler is replaced by ground truth: whatever is asked for, or the subject too when it is learnt."""
    subject, rng = SUBJECTS["bumble"], np.random.default_rng(0)

    def draw(model, prompts, seeds, **_):
        return np.stack([_truth(prompt, learnt, subject, rng) for prompt in prompts])

    monkeypatch.setattr(personalise, "images", draw)
    monkeypatch.setattr(personalise, "load_clip", lambda name: FakeClip())
    monkeypatch.setattr(personalise, "clip_image_similarity", lambda a, b, encoder: 0.5)
    references = np.stack([render(subject_scene(subject, rng)) for _ in range(5)])
    model = SimpleNamespace(device=torch.device("cpu"))
    result = personalise.measure(model, "bumble", "sks", references, ordinary=6)
    assert result.prompt_accuracy == 1.0 and result.class_kept == 1.0
    assert result.ground_accuracy == 1.0
    assert (result.subject_known == 1.0) is learnt
    assert (result.subject_composed == 1.0) is learnt
    assert (result.subject_oracle > 0.8) is learnt
    assert result.memorised < 0.2
    assert set(result.scores()) == {
        "subject_oracle", "subject_known", "subject_composed", "subject_clip", "prompt_accuracy", "ground_accuracy",
        "class_kept", "memorised",
    }  # fmt: skip


def _truth(prompt, learnt, subject, rng):
    """A picture that shows what the prompt asks."""
    request = oracle.read_caption(prompt)
    places = [(15, 32), (49, 32)] if request.relation in ("left of", "right of") else [(32, 15), (32, 49)]
    if request.relation in ("right of", "below"):
        places.reverse()
    things = [
        Thing(shape=w.shape, color=w.color or "red", x=x, y=y, radius=RADII[w.size or "large"])
        for w, (x, y) in zip(request.things, places, strict=False)
    ]
    if "sks" in prompt and learnt:
        if len(things) == 1:
            return render(subject_scene(subject, rng))
        things[0] = subject.thing(things[0].x, things[0].y, things[0].radius)
    tone, texture = request.ground or ("light", "plain")
    return render(Scene(things=tuple(things), tone=tone, texture=texture))
