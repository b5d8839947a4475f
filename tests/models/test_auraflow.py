"""What AuraFlow has of its own: padding of zeros, a square table of places, a scheduler that cannot shift by size."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny import remade, tiny_model, tiny_pipe

from visiontune.adapters import attach
from visiontune.errors import UserError
from visiontune.models.auraflow import AuraFlow


def test_a_prompt_is_what_umt5_gives_and_zeros_where_it_is_padded():
    model = tiny_model("auraflow")
    cond = model.embed(["a red circle", ""])
    read = model.pipe.tokenizer(["a red circle", ""], padding="max_length", max_length=256, return_tensors="pt")
    assert cond.tokens.shape == (2, 256, 72) and cond.mask is None
    words = read.attention_mask.bool()
    torch.testing.assert_close(cond.tokens[words], model.pipe.text_encoder(**read)[0][words])
    assert not cond.tokens[~words].any() and words.sum(1).tolist() == [5, 1]


def test_pictures_must_fit_the_table_of_places():
    model = tiny_model("auraflow")
    assert (model.unit, model.resolution) == (8, 16)
    assert model.size(48, 16) == (48, 16)
    for refused in (lambda: model.size(16, 56), lambda: model.check_area(16, 56)):
        with pytest.raises(UserError, match="height and width must be at most 48, not 16 and 56"):
            refused()
    cond, x_t = model.embed(["a"]), torch.randn(1, 4, 8, 28, generator=torch.Generator().manual_seed(0))
    assert model.denoiser(x_t, cond.tokens, torch.ones(1)).sample.isfinite().all()
    with pytest.raises(UserError, match="must be at most 48, not 16 and 56"):
        model.predict(x_t, torch.tensor([1000.0]), cond)


def test_the_feed_forward_layers_are_those_of_blocks():
    model = tiny_model("auraflow")
    counts = {"attention": 8 + 2 * 4, "attention+ff": 8 + 6 + 2 * (4 + 3)}
    for targets, expected in counts.items():
        assert len(attach(model.of("denoiser"), "lora", targets=targets, presets=model.presets()).layers) == expected
        model = tiny_model("auraflow")


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (DDIMScheduler(), "its scheduler is not one of flow"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "set use_dynamic_shifting to false"),
    ],
)
def test_schedulers_that_its_pipeline_cannot_use_are_refused(scheduler, why):
    pipe = tiny_pipe("auraflow")
    pipe.scheduler = scheduler
    with pytest.raises(UserError, match=why):
        AuraFlow(pipe)


def test_a_transformer_of_other_channels_is_refused():
    pipe = tiny_pipe("auraflow")
    pipe.transformer = remade(pipe.transformer, in_channels=9)
    with pytest.raises(UserError, match="its transformer takes 9 channels"):
        AuraFlow(pipe)
