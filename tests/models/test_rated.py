"""Ratings that a denoiser is told: nothing at first, each row its own, and what pipelines and files make of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import tiny_model

from visiontune import adapters, models
from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import CFG
from visiontune.errors import UserError
from visiontune.models._rated import WIDTH, features
from visiontune.weights.export import export

NAMES = ["faithful", "clean"]
# An embedding of time alone, within another module, and beside one of guidance.
FAMILIES = ["sd", "sdxl", "sd3", "flux", "pixart"]
PROMPTS = ["a red circle", "a blue square", "a green triangle"]


def told(made, scores: list[list[float]] | None) -> torch.Tensor:
    """A prediction of rows that are alike but for their ratings."""
    x = torch.randn(1, *made.latent_shape(), generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    cond = made.embed(PROMPTS[:1] * 3)
    if scores is not None:
        cond = Condition(**{**vars(cond), "extra": {**cond.extra, "scores": torch.tensor(scores)}})
    with torch.no_grad():
        return made.predict(x, torch.tensor([500, 500, 500]), cond)


def taught(made):
    """An adapter with something in it, ratings included."""
    whole = made.embed_scores(NAMES)
    found = adapters.attach(made.of("denoiser"), "lora", targets="attention", presets=made.presets(), whole=whole)
    with torch.no_grad():
        for number, parameter in enumerate(found.parameters()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return found.eval()


def test_each_rating_has_a_slice_of_its_own_and_one_that_is_not_told_is_zero():
    one = features(torch.tensor([[0.2, 0.7], [0.9, 0.7], [0.2, math.nan]]))
    assert one.shape == (3, 2 * WIDTH) and one.dtype == torch.float32
    assert torch.equal(one[0, WIDTH:], one[1, WIDTH:]) and not torch.equal(one[0, :WIDTH], one[1, :WIDTH])
    assert torch.equal(one[2, :WIDTH], one[0, :WIDTH]) and not one[2, WIDTH:].any()
    # Of a hundred times the rating; the first turns fastest.
    assert torch.allclose(one[0, 0], torch.tensor(20.0).sin(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_first_they_change_nothing_and_taken_out_nothing_is_left(family):
    made = tiny_model(family)
    before, keys = told(made, None), made.denoiser.state_dict().keys()
    layers = made.embed_scores(NAMES)
    assert all(dict(made.denoiser.named_modules())[name.partition(".")[2]] is one for name, one in layers.items())
    for scores in (None, [[0.0, 1.0], [0.5, math.nan], [1.0, 1.0]]):
        assert torch.equal(told(made, scores), before)
    with pytest.raises(UserError, match=r"is told ratings already \(faithful, clean\)"):
        made.embed_scores(["other"])
    made.drop_scores()
    assert made.denoiser.state_dict().keys() == keys and not made.rated and torch.equal(told(made, None), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_told_its_own_and_nothing_of_others(family):
    made = tiny_model(family)
    taught(made)
    rows = [[0.1, 0.9], [0.8, 0.9], [0.1, math.nan]]
    found, turned = told(made, rows), told(made, rows[::-1])
    assert not any(torch.allclose(found[0], found[i], atol=1e-4) for i in (1, 2))
    assert torch.allclose(found, turned.flip(0), atol=1e-5)
    # Of rows of which nothing is said what is asked of all is told: the best at first.
    assert torch.allclose(told(made, None), told(made, [[1.0, 1.0]] * 3), atol=1e-5)
    made.ask([0.1, None])
    assert torch.allclose(told(made, None)[2], found[2], atol=1e-5)
    assert torch.equal(told(made, rows), found)


def test_the_stock_pipeline_draws_what_is_asked_on_both_sides_of_guidance():
    made = tiny_model("sd")
    taught(made)
    requests = [Request(prompt=prompt, seed=0) for prompt in PROMPTS[:2]]

    def drawn() -> np.ndarray:
        return made.draw(requests, steps=2, guidance=CFG(scale=3.0))

    best = drawn()
    made.ask([0.0, None])
    assert np.abs(drawn() - best).max() > 1e-3
    made.ask([1.0, 1.0])
    assert np.array_equal(drawn(), best)


def test_a_file_brings_them_and_another_model_without_them_is_as_it_was(tmp_path):
    made, other = tiny_model("sd"), tiny_model("sd")
    before = told(other, None)
    found = taught(made)
    file = found.save(tmp_path / "a.safetensors", {"scores": '{"faithful": [0, 1], "clean": [5, 0]}'})
    header = adapters.read_header(file)
    assert header["scores"] == {"faithful": [0, 1], "clean": [5, 0]} and not header["tells_guidance"]
    other.accept(header)
    assert not other.embedded and other.rated == ("faithful", "clean")
    loaded = adapters.load(other.networks(), file)
    rows = [[0.1, 0.9], [0.8, math.nan], [0.1, 0.2]]
    assert torch.equal(told(other, rows), told(made, rows))
    with loaded.disable():
        assert torch.equal(told(other, rows), before)
    loaded.detach()
    other.drop_scores()
    assert torch.equal(told(other, None), before)


def test_a_damaged_range_in_a_file_is_refused(tmp_path):
    found = taught(tiny_model("sd"))
    for said in ('{"a": [1, 1]}', '{"a": [0]}', '["a"]'):
        file = found.save(tmp_path / "a.safetensors", {"scores": said})
        with pytest.raises(UserError, match="'scores' is not a mapping of ratings"):
            adapters.read_header(file)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_merged_model_draws_the_best_without_layers_of_its_own(family, tmp_path):
    made = tiny_model(family)
    found = taught(made)
    wanted = told(made, None)
    with pytest.raises(UserError, match="a layer that the base does not have: export as merged"):
        export(found, tmp_path / "a.safetensors", "peft", dtype=torch.float32)
    done = export(found, tmp_path / "merged", "merged", dtype=torch.float32, model=made)
    assert any("draws the best by faithful, clean" in note for note in done.notes)
    opened = models.load(str(tmp_path / "merged"))
    assert not opened.rated and torch.allclose(told(opened, None), wanted, atol=1e-4)


def test_bfloat16_tells_hundredths_apart():
    made = tiny_model("sd")
    made.denoiser.to(torch.bfloat16)
    made.embed_scores(NAMES)
    seen = []
    made.denoiser.time_embedding.scores.register_forward_pre_hook(lambda module, args: seen.append(module.told))
    told(made, [[0.98, 0.5], [0.99, 0.5], [1.0, 0.5]])
    assert seen[0].dtype == torch.float32 and len(seen[0][:, 0].unique()) == 3


def test_a_denoiser_without_an_embedding_of_time_is_refused():
    with pytest.raises(UserError, match=r"no embedding of time that ratings could be added to: leave data\.scores out"):
        tiny_model("krea2").embed_scores(NAMES)
