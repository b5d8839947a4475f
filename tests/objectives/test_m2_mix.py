"""Arcs on the sphere, and losses of what lies on them against loops in float64."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from visiontune.core import Batch
from visiontune.models.contrastive import Features
from visiontune.objectives import contrastive, m2_mix
from visiontune.objectives.base import Tools
from visiontune.objectives.m2_mix import between

CAPTIONS = ["a dog", "a cat", "a dog", "a tree"]


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


class Model(SimpleNamespace):
    """Features that are given, in float64."""

    logit_scale = torch.tensor(5.0, dtype=torch.float64)

    def image_features(self, images):
        return Features(pooled=self.images, dense=self.images[:, None])

    def text_features(self, prompts):
        return Features(pooled=self.texts, dense=self.texts[:, None])

    def clamp(self):
        pass


def model(rows=4) -> Model:
    return Model(images=unit(rows, 6, seed=1).requires_grad_(), texts=unit(rows, 6, seed=2).requires_grad_())


def batch(captions=CAPTIONS) -> Batch:
    rows = len(captions)
    none = torch.zeros(rows, dtype=torch.bool)
    ids = [str(i) for i in range(rows)]
    data = {"image": torch.zeros(rows, 3, 2, 2)}
    return Batch(prompts=[*captions], data=data, cond=None, weight=torch.ones(rows), prior=none, ids=ids)


def loss(captions=CAPTIONS, **options):
    found = m2_mix.build(m2_mix.Config(**options)).loss(model(len(captions)), batch(captions), Tools(seed=4))
    return found.total.double(), found.terms


def the_share(beta=0.5) -> float:
    """What the objective draws with these seeds."""
    chance = random.Random(int(torch.randint(2**62, (), generator=Tools(seed=4).shared("mix"))))
    return chance.betavariate(beta, beta)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_points_lie_on_the_arc_where_the_share_says(share):
    one, other = unit(5, 6, seed=3), unit(5, 6, seed=4)
    found, angle = between(one, other, share), (one * other).sum(1).acos()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close((found * one).sum(1).clamp(max=1).acos(), (1 - share) * angle, rtol=0, atol=1e-7)
    torch.testing.assert_close((found * other).sum(1).clamp(max=1).acos(), share * angle, rtol=0, atol=1e-7)


def test_between_a_vector_and_itself_is_the_vector_with_a_gradient():
    one = unit(3, 6, seed=5).float().requires_grad_()
    found = between(one, one, 0.3)
    torch.testing.assert_close(found, one)
    assert torch.autograd.grad(found.sum(), one)[0].isfinite().all()


def test_without_mixes_the_loss_is_clips_to_the_bit():
    plain = contrastive.build(contrastive.Config()).loss(model(), batch(), Tools()).total
    assert torch.equal(loss(mix_weight=0.0)[0], plain.double())


def test_what_lies_between_others_is_told_apart_in_the_place_of_them():
    plain, share, made = loss(mix_weight=0.0)[0], the_share(), model()
    total = torch.zeros((), dtype=torch.float64)
    for mine in (made.images, made.texts):
        for i in range(4):
            cosines = []
            for j in range(4):
                angle = math.acos(float((made.images[j] @ made.texts[j]).detach()))
                point = math.sin(share * angle) * made.images[j] + math.sin((1 - share) * angle) * made.texts[j]
                if j == i:
                    cosines.insert(0, made.images[i] @ made.texts[i])
                elif CAPTIONS[i] != CAPTIONS[j]:
                    cosines.append(mine[i] @ point / math.sin(angle))
            total = total - F.log_softmax(torch.stack(cosines) / 0.2, 0)[0] / 4
    torch.testing.assert_close(loss(mix_weight=2.0, temperature=0.2)[0], plain + 2 * total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", ["picture_weight", "text_weight", "pair_weight"])
def test_neighbours_that_are_mixed_belong_to_both(which):
    captions = ["a dog", "a cat", "a car", "a tree"]
    plain, share, made = loss(captions, mix_weight=0.0)[0], the_share(), model()
    images, texts = made.images, made.texts
    if which != "text_weight":
        images = between(images, images.flip(0), share)
    if which != "picture_weight":
        texts = between(texts, texts.flip(0), share)
    logits = 5 * images @ texts.T
    weights = (1.0, 1.0) if which == "pair_weight" else (share, 1 - share)
    target = weights[0] * torch.eye(4, dtype=torch.float64) + weights[1] * torch.eye(4, dtype=torch.float64).flip(0)
    own = -(target * logits.log_softmax(1)).sum(1).mean() - (target * logits.T.log_softmax(1)).sum(1).mean()
    found = loss(captions, mix_weight=0.0, **{which: 3.0})[0]
    torch.testing.assert_close(found, plain + 3 * own / 2, rtol=1e-6, atol=1e-6)


def test_an_odd_batch_has_one_that_is_its_own_neighbour():
    captions = ["a dog", "a cat", "a car"]
    made = model(3)
    config = m2_mix.Config(picture_weight=1.0, text_weight=1.0, pair_weight=1.0)
    m2_mix.build(config).loss(made, batch(captions), Tools(seed=4)).total.backward()
    assert made.images.grad.isfinite().all() and made.images.grad.any()


def test_the_share_differs_from_batch_to_batch():
    found = {
        float(m2_mix.build(m2_mix.Config(mix_weight=1.0)).loss(model(), batch(), Tools(seed=4, index=i)).total)
        for i in range(5)
    }
    assert len(found) == 5
