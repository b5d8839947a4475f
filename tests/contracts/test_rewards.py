"""What every reward must keep, whoever wrote it: modules on tiny random weights, and each spec of the catalogue."""

from __future__ import annotations

import importlib
import math
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_rewards import OPTIONS, smooth

from visiontune import catalogue, config, plugin
from visiontune.errors import UserError
from visiontune.ops.pixels import to_tensor
from visiontune.rewards import loading
from visiontune.rewards.base import Reward

OPTIONS = {
    **OPTIONS,
    "mix": lambda folder: {"terms": [{"reward": "color", "weight": 2}, {"reward": "brightness", "weight": -1}]},
}


def options_of(name: str, folder: Path) -> dict[str, Any]:
    """Options with which a reward loads from a folder: those that its test file's `CONTRACT` gives, if it needs any."""
    if name in OPTIONS:
        return OPTIONS[name](folder)
    own = Path(__file__).parents[1] / "rewards" / f"test_{name}.py"
    contract = getattr(importlib.import_module(f"rewards.{own.stem}"), "CONTRACT", None) if own.is_file() else None
    return contract(folder) if contract else {}


# A server is no module's business to start: tests/rewards/test_remote.py does.
MODULES = sorted(set(plugin.names("rewards")) - {"remote"})
SPECS = catalogue.names("rewards")
PROMPTS = ["a red circle", "a blue star", "a red circle", "a blue star"]


def images(count: int = 4, side: int = 64) -> torch.Tensor:
    """Two smooth pictures and two of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return to_tensor(np.stack([smooth(side, side, i) if i % 2 else noise[i] for i in range(count)]))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reward]:
    """Each module's reward, made once."""
    made: dict[str, Reward] = {}

    def get(name: str) -> Reward:
        if name not in made:
            folder: Path = tmp_path_factory.mktemp(name)
            made[name] = loading.load({"name": name, **options_of(name, folder)})
        return made[name]

    return get


def test_every_module_has_a_spec_in_the_catalogue() -> None:
    assert {config.load_reward_spec(spec).name for spec in SPECS} >= {*MODULES, "remote"}


@pytest.mark.parametrize("name", MODULES)
def test_scores_are_finite_float32_within_the_range_and_repeatable(name: str, built) -> None:
    reward = built(name)
    extremes = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)] * 2)
    for batch in (images(), extremes):
        scores = reward(batch, PROMPTS)
        low, high = reward.range
        assert scores.dtype == torch.float32 and scores.shape == (4,)
        assert low - 1e-4 <= scores.min() and scores.max() <= high + 1e-4
        assert torch.equal(scores, reward(batch, PROMPTS))


@pytest.mark.parametrize("name", MODULES)
def test_images_are_told_apart(name: str, built) -> None:
    scores = built(name)(images(), [PROMPTS[0]] * 4)
    assert len(set(scores.tolist())) > 1


@pytest.mark.parametrize("name", MODULES)
def test_a_score_depends_on_the_batch_just_where_the_reward_says_so(name: str, built) -> None:
    reward = built(name)
    together = reward(images(), PROMPTS)
    if reward.groupwise:
        others = images()
        others[2] = 0.5
        assert (reward(others, PROMPTS) - together)[0].abs() > 1e-6
        # Those of another prompt do not matter.
        torch.testing.assert_close(reward(others, PROMPTS)[1::2], together[1::2], atol=1e-5, rtol=1e-4)
        return
    alone = torch.cat([reward(images()[i : i + 1], [PROMPTS[i]]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(
        reward(images()[order], [PROMPTS[i] for i in order]), together[order], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", MODULES)
def test_inputs_are_left_as_they_were(name: str, built) -> None:
    batch, prompts = images(), list(PROMPTS)
    built(name)(batch, prompts)
    assert torch.equal(batch, images()) and prompts == PROMPTS


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_there_just_where_the_reward_says_so(name: str, built) -> None:
    reward = built(name)
    batch = images().requires_grad_()
    scores = reward(batch, PROMPTS)
    assert scores.requires_grad == reward.differentiable
    if not reward.differentiable:
        return
    grad = torch.autograd.grad(scores.sum(), batch)[0]
    assert torch.isfinite(grad).all()
    assert all(own.abs().max() > 0 for own in grad)
    with torch.no_grad():
        assert not reward(batch, PROMPTS).requires_grad
    with pytest.raises(RuntimeError):
        torch.autograd.grad(reward(images(), PROMPTS).sum(), batch)


@pytest.mark.parametrize("name", [n for n in MODULES if n not in ("jpeg", "mrc", "oracle")])
def test_gradients_are_those_of_finite_differences(name: str, built) -> None:
    """Along three random smooth directions and at single pixels, in float32 sums taken in float64."""
    reward = built(name)
    assert reward.differentiable
    base = to_tensor(np.stack([smooth(64, 64, i) for i in range(2)])) * 0.8 + 0.1
    prompts = [PROMPTS[0]] * 2
    batch = base.clone().requires_grad_()
    grad = torch.autograd.grad(reward(batch, prompts).sum(), batch)[0].double()
    generator = torch.Generator().manual_seed(0)
    # The direction of the gradient makes the difference large beside float32's rounding.
    for _ in range(3):
        window = torch.zeros_like(base)
        window[..., : int(torch.randint(24, 64, (), generator=generator)), 8:] = 1
        direction = (grad.float() * window) / (grad * window).norm().float()
        slopes = []
        for h in (0.05, 0.025):
            with torch.no_grad():
                ahead, behind = (reward(base + sign * h * direction, prompts).double().sum() for sign in (1, -1))
            slopes.append((ahead - behind) / (2 * h))
        # Richardson's extrapolation takes the cubic term away.
        slope = (4 * slopes[1] - slopes[0]) / 3
        expected = (grad * direction).sum()
        assert slope.item() == pytest.approx(expected.item(), rel=0.05, abs=1e-7)


# The oracle reads 64x64 pictures of the pocket world alone, MRC a grid of views of one size.
@pytest.mark.parametrize("name", [n for n in MODULES if n not in ("mrc", "oracle")])
def test_images_of_any_size_are_scored(name: str, built) -> None:
    for height, width in ((48, 80), (31, 20)):
        batch = torch.stack([to_tensor(smooth(height, width, i)[None])[0] for i in range(2)])
        assert built(name)(batch, [PROMPTS[0]] * 2).isfinite().all()


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_loads_without_a_network_or_says_in_one_line_what_to_fetch(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was made"))
    declared = config.load_reward_spec(spec)
    try:
        reward = loading.load(spec)
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert "hf download" in message or "download sac+logos" in message or "set " in message
        assert "FOLDER" in message or "FILE" in message or "http" in message
        return
    assert (reward.name, reward.differentiable) == (spec, declared.differentiable)
    assert declared.range[0] <= reward.range[0] and reward.range[1] <= declared.range[1]
    finite = [end for end in declared.range if math.isfinite(end)]
    assert set(finite) <= set(reward.range)
    prompts = ["a red circle"] * 4
    scores = reward(images(), prompts)
    assert reward.range[0] - 1e-4 <= scores.min() and scores.max() <= reward.range[1] + 1e-4


def test_specs_name_a_licence() -> None:
    assert all(config.load_reward_spec(spec).licence for spec in SPECS)


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_pins_the_commit_of_its_own_model_alone(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = config.load_reward_spec(spec).options
    if "/" not in str(own.get("model", "")) or own["model"].startswith("pocket/"):
        assert "revision" not in own
        return
    assert re.fullmatch("[0-9a-f]{40}", own["revision"])
    options = {"name": spec, "model": "nobody/another"}
    assert "revision" not in loading.resolve(options)
    assert loading.resolve({**options, "revision": "v2"})["revision"] == "v2"
    assert "base_revision" not in loading.resolve({"name": spec, "base": "nobody/another"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Image.new("RGB", (8, 8)).save(tmp_path / "subject.png")
    (tmp_path / "ask.txt").write_text("{text_prompt}? <|Reward|>")
    needed = {"dino": {"references": str(tmp_path)}, "hpsv3": {"instruction": str(tmp_path / "ask.txt")}}.get(spec, {})
    with pytest.raises(UserError) as refused:
        loading.load({"name": spec, **needed})
    assert f"--revision {own['revision']}" in str(refused.value) or "download sac+logos" in str(refused.value)
