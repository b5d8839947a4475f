"""Metrics against values worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.evaluation import metrics
from visiontune.pocket import scenes, world


class Lookup:
    """An encoder whose features are known: an image's is the unit vector that its first pixel counts, a text's too."""

    mean = torch.zeros(1)

    def image_features(self, images: Tensor) -> Tensor:
        return torch.eye(256)[(images[:, 0, 0, 0] * 255).round().long()]

    def text_features(self, prompts: list[str]) -> Tensor:
        return torch.eye(256)[[int(p) for p in prompts]]


def _pictures(numbers: list[int]) -> np.ndarray:
    return np.stack([np.full((4, 4, 3), n, np.uint8) for n in numbers])


def test_prompt_accuracy_is_the_share_that_the_oracle_accepts() -> None:
    pairs = list(itertools.islice(scenes.stream(3, "one"), 8))
    images = np.stack([world.render(scene) for scene, _ in pairs])
    texts = [text for _, text in pairs]
    full = metrics.prompt_accuracy(images, texts)
    assert full > 0.8
    half = texts[:4] + ["three purple hearts"] * 4
    assert metrics.prompt_accuracy(images, half) == pytest.approx(metrics.prompt_accuracy(images[:4], texts[:4]) / 2)


def test_subject_metrics_tell_subjects_apart() -> None:
    rng = np.random.default_rng(0)
    drawn = [scenes.subject_scene(world.SUBJECTS[n], rng) for n in ("ember", "ember", "poppy", "poppy")]
    images = np.stack([world.render(scene) for scene in drawn])
    assert metrics.subject_recognition(images, "ember") == 0.5
    assert metrics.subject_fidelity(images[:2], "ember") > 0.8 > metrics.subject_fidelity(images[2:], "ember")
    with pytest.raises(UserError, match="did you mean 'ember'"):
        metrics.subject_fidelity(images, "embers")


def test_memorisation_counts_pictures_that_repeat_one_reference() -> None:
    rng = np.random.default_rng(0)
    references = rng.integers(256, size=(4, 8, 8, 3), dtype=np.uint8)
    near = np.clip(references[:1].astype(int) + rng.integers(-9, 10, size=(1, 8, 8, 3)), 0, 255).astype(np.uint8)
    own = rng.integers(256, size=(2, 8, 8, 3), dtype=np.uint8)
    assert metrics.memorisation(np.concatenate([near, references[2:], own]), references) == pytest.approx(3 / 5)
    with pytest.raises(UserError, match="at least two references"):
        metrics.memorisation(own, references[:1])


def test_hyperspherical_energy() -> None:
    corners = torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0, 0], [0, 0, 5]])
    assert metrics.hyperspherical_energy(corners) == pytest.approx(1 / math.sqrt(2))
    w = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    energy = metrics.hyperspherical_energy(w)
    assert metrics.hyperspherical_energy((w.flatten(1) @ turn).view_as(w)) == pytest.approx(energy, rel=1e-12)
    assert metrics.hyperspherical_energy(w + 0.1) != pytest.approx(energy, rel=1e-3)


def test_psnr_of_a_known_error() -> None:
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    assert metrics.psnr(a, a + 20) == pytest.approx(20 * math.log10(255 / 20))
    # Unsigned differences must not wrap round.
    assert metrics.psnr(a + 20, a) == pytest.approx(metrics.psnr(a, a + 20))
    assert metrics.psnr(a, a) == math.inf
    with pytest.raises(UserError, match="equal shapes"):
        metrics.psnr(a, a[:1])


def test_clip_image_similarity_is_the_mean_over_all_pairs() -> None:
    similarity = metrics.clip_image_similarity(_pictures([1, 2]), _pictures([1, 3, 4]), Lookup())
    assert similarity == pytest.approx(1 / 6)


def test_retrieval_counts_the_nearest_prompt_of_whole_pools() -> None:
    numbers = list(range(6))
    prompts = [str(n) for n in (0, 1, 3, 2, 4, 5)]
    assert metrics.retrieval_top1(_pictures(numbers), prompts, Lookup(), pool=6) == pytest.approx(4 / 6)
    # Two pools of two; the pair in the odd last pool is left out.
    assert metrics.retrieval_top1(_pictures(numbers[:5]), prompts[:5], Lookup(), pool=2) == pytest.approx(2 / 4)
    assert metrics.retrieval_top1(_pictures([7, 7]), ["7", "7"], Lookup(), pool=2) == 1.0


def test_a_metric_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="needs images"):
        metrics.prompt_accuracy(np.zeros((0, 64, 64, 3), np.uint8), [])
    with pytest.raises(UserError, match="not 2 and 1"):
        metrics.retrieval_top1(_pictures([1, 2]), ["1"], Lookup())
