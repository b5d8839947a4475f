"""What was learnt against what was kept: the judges, and the walk over checkpoints and strengths."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from visiontune import adapters
from visiontune.data.base import Config as DataConfig
from visiontune.errors import UserError
from visiontune.evaluation import kept
from visiontune.evaluation.kept import Point, best, judge_of, points


def run(root: str = "pocket/bumble", source: str = "pocket/sd"):
    data = DataConfig(root=root, prompt="a photo of a [trigger] [class]", class_noun="circle")
    return SimpleNamespace(data=data, model=SimpleNamespace(source=source))


class Flat:
    """Features of a picture: its middle pixel, as a unit vector."""

    mean = torch.zeros(1)

    def image_features(self, images):
        middle = images[:, :, images.shape[2] // 2, images.shape[3] // 2] + 1e-3
        return middle / middle.norm(dim=1, keepdim=True)


@pytest.fixture
def likeness(monkeypatch):
    """A judge to whom pictures are colours: the user's are yellow, `drawn` says what a model draws."""
    drawn = {}
    monkeypatch.setattr(kept, "load_clip", lambda name: Flat())
    monkeypatch.setattr(
        kept, "images", lambda model, prompts, seeds, **_: np.stack([_filled(drawn[model](p)) for p in prompts])
    )
    yellow = [SimpleNamespace(sources={"image": SimpleNamespace(open=lambda: None)})] * 3
    monkeypatch.setattr(kept, "read", lambda data: yellow)
    monkeypatch.setattr(kept, "_square", lambda picture, side: _filled((255, 255, 0))[None])
    return kept.Likeness(run("dogs"), "clip", ordinary=6), drawn


def _filled(color):
    return np.broadcast_to(np.array(color, np.uint8), (8, 8, 3))


def _color(prompt: str):
    return tuple(np.random.default_rng(list(prompt.encode())).integers(0, 255, 3))


def test_likeness_places_a_model_between_its_base_and_the_pictures(likeness):
    judge, drawn = likeness
    drawn["base"] = lambda p: (0, 0, 255) if "sks" in p else _color(p)
    drawn["good"] = lambda p: (255, 255, 0) if "sks" in p else _color(p)
    drawn["half"] = lambda p: (120, 120, 160) if "sks" in p else _color(p)
    drawn["flooded"] = lambda p: (255, 255, 0)
    drawn["shuffled"] = lambda p: (0, 0, 255) if "sks" in p else _color(p[::-1])
    assert judge("base")[:2] == (0.0, pytest.approx(1, abs=1e-5))
    assert judge("good")[:2] == (pytest.approx(1, abs=1e-5), pytest.approx(1, abs=1e-5))
    assert 0.2 < judge("half")[0] < 0.9
    assert judge("flooded")[0] == pytest.approx(1, abs=1e-5) and judge("flooded")[1] < 0.5
    assert judge("shuffled")[0] == 0 and judge("shuffled")[1] < 0.5


def test_a_subject_of_one_s_own_has_no_judge_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(kept, "Oracle", lambda run: "oracle")
    assert judge_of(run()) == judge_of(run(source="pocket/flow")) == "oracle"
    for own in (run("photos"), run(source="some/model")):
        assert judge_of(own) is None


def test_every_checkpoint_is_judged_at_every_strength_after_the_base():
    net = nn.Sequential(nn.Linear(3, 3))
    made = adapters.attach(net, "lora", rank=1, targets="Linear").eval()
    x, base = torch.ones(1, 3), net(torch.ones(1, 3)).detach()
    first = {name: torch.full_like(tensor, 0.5) for name, tensor in made.named_parameters()}
    second = {name: torch.full_like(tensor, 1.0) for name, tensor in made.named_parameters()}

    def judge(model):
        moved = float((model(x) - base).detach().abs().max())
        return moved, 1 - moved / 10, {"moved": moved}

    found = list(points(net, made, [(10, first, [0.5, 1.0]), (20, second, [0.5, 1.0])], judge))
    assert [(p.step, p.scale) for p in found] == [(0, 0.0), (10, 0.5), (10, 1.0), (20, 0.5), (20, 1.0)]
    one = found[2].learnt
    assert one > 0.1
    assert [p.learnt for p in found] == pytest.approx([0, one / 2, one, 2 * one, 4 * one], rel=1e-4)
    with pytest.raises(UserError, match="step 30 does not fit"):
        list(points(net, made, [(30, {}, [1.0])], judge))


def test_the_best_point_has_both():
    def point(learnt, held):
        return Point(step=1, scale=1.0, learnt=learnt, kept=held, scores={"a": 0.0})

    found = [point(0.0, 1.0), point(1.0, 0.3), point(0.8, 0.9), point(0.6, 1.0)]
    assert best(found) is found[2]
    assert "80% of the subject learnt and 90% kept (the base: 0% and 100%)" in kept.table(found)
