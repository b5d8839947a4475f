"""Layers that tell a denoiser the scale of guidance: nothing by themselves, and what stock pipelines tell it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_model

from visiontune import adapters, models
from visiontune.core import Request
from visiontune.diffusion.guidance import CFG, NO_GUIDANCE, Embedded, guided
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.models.sd import sines
from visiontune.ops.pixels import shown

TOLD = {"sd": {}, "sdxl": {}, "flux": {"schnell": True}}
each = pytest.mark.parametrize("family", TOLD)
PROMPTS = ["a red circle", "a blue square"]
REQUESTS = [Request(prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]


def model(family: str):
    return tiny_model(family, **TOLD[family])


def asked(made, scale: float) -> torch.Tensor:
    x = torch.randn(2, *made.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return guided(made, x, torch.tensor([700, 300]), made.embed(PROMPTS), None, Embedded(scale=scale))


def taught(made):
    """The layers with something in them, as an adapter's and as the network's own."""
    whole = made.embed_guidance()
    found = adapters.attach(made.of("denoiser"), "lora", targets="attention", presets=made.presets(), whole=whole)
    with torch.no_grad():
        for number, parameter in enumerate(found.parameters()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return found.eval()


@each
def test_put_in_they_change_nothing_and_taken_out_nothing_is_left(family):
    made = model(family)
    keys, config, before = made.denoiser.state_dict().keys(), dict(made.denoiser.config), asked(made, 1.0)
    layers = made.embed_guidance()
    assert all(dict(made.denoiser.named_modules())[name.partition(".")[2]] is one for name, one in layers.items())
    assert made.guidance(5.0) == Embedded(scale=5.0) and made.blank
    assert all(torch.equal(asked(made, scale), before) for scale in (1.0, 2.5, 8.0))
    with pytest.raises(UserError, match="is told its guidance already"):
        made.embed_guidance()
    made.drop_guidance()
    assert made.denoiser.state_dict().keys() == keys and dict(made.denoiser.config) == config
    assert made.guidance(5.0) == CFG(scale=5.0) and torch.equal(asked(made, 1.0), before)


@each
def test_what_is_learnt_in_them_is_drawn_alike_by_rollouts_and_stock_pipelines_merged_or_not(family, tmp_path):
    made = model(family)
    base = asked(made, 1.0)
    found, drawn = taught(made), {}
    assert torch.equal(asked(made, 3.0), asked(made, 3.0)) and not torch.allclose(asked(made, 3.0), asked(made, 3.5))
    with found.disable():
        assert torch.equal(asked(made, 3.0), base)
    noise = torch.stack([made.start_noise(one) for one in REQUESTS])
    for scale in (1.0, 2.5, 6.0):
        with torch.no_grad():
            end = rollout(
                made, made.embed(PROMPTS), guidance=Embedded(scale=scale), chain=2, start=Start(latents=noise)
            )
            ours = shown(made.decode(end.final)).permute(0, 2, 3, 1).numpy()
        drawn[scale] = made.draw(REQUESTS, steps=2, guidance=made.guidance(scale))
        np.testing.assert_allclose(drawn[scale], ours, atol=2e-5)
    plain = made.draw(REQUESTS, steps=2, guidance=NO_GUIDANCE)
    np.testing.assert_array_equal(plain, drawn[1.0])
    assert np.abs(drawn[2.5] - drawn[6.0]).max() > 1e-3
    found.merge()
    made.save(tmp_path / "merged")
    opened = models.load(str(tmp_path / "merged"))
    assert opened.embedded and not opened.blank
    np.testing.assert_allclose(opened.draw(REQUESTS, steps=2, guidance=opened.guidance(2.5)), drawn[2.5], atol=2e-5)


def test_a_unet_is_told_what_its_stock_pipeline_tells_it():
    made = model("sd")
    taught(made)
    scale = torch.tensor([1.0, 4.25, 7.0])
    theirs = made.pipe.get_guidance_scale_embedding(scale - 1, 256)
    torch.testing.assert_close(sines(made.denoiser, scale), theirs, rtol=0, atol=0)
    half = 10_000 ** (-torch.arange(128, dtype=torch.float64) / 127)
    angles = 3250 * half
    expected = torch.cat([angles.sin(), angles.cos()])
    torch.testing.assert_close(theirs[1].double(), expected, rtol=0, atol=2e-3)
    seen = {}
    made.denoiser.time_embedding.register_forward_pre_hook(lambda _, given: seen.update(told=given[1]))
    made.draw(REQUESTS[:1], steps=1, guidance=made.guidance(4.25))
    torch.testing.assert_close(seen["told"][0], sines(made.denoiser, scale)[1])


def test_half_precision_does_not_round_the_scale():
    made = model("sd")
    taught(made)
    seen = {}
    made.denoiser.to(torch.bfloat16)
    made.denoiser.time_embedding.register_forward_pre_hook(lambda _, given: seen.update(told=given[1]))
    asked(made, 4.27)
    assert torch.equal(seen["told"][0], sines(made.denoiser, torch.tensor([4.27]))[0].bfloat16())


def test_a_stack_on_top_has_it_told_and_classifier_free_guidance_is_refused():
    made = model("sd")
    taught(made)
    stack = GuidanceStack.of([{"embedded": 2.5}])
    np.testing.assert_array_equal(
        made.draw(REQUESTS, steps=2, guidance=stack), made.draw(REQUESTS, steps=2, guidance=made.guidance(2.5))
    )
    with pytest.raises(UserError, match="its pipeline makes no second call: take embedded in the place of cfg"):
        made.draw(REQUESTS, steps=2, guidance=CFG(scale=2.0))
    with pytest.raises(UserError, match="leave the negative prompt out"):
        made.draw([Request(prompt="a", negative="b")], steps=2, guidance=made.guidance(2.0))


def test_families_without_a_place_for_it_are_refused():
    with pytest.raises(UserError, match="family sd3 are told no scale of guidance: distil one strength, by cfg_scale"):
        tiny_model("sd3").embed_guidance()
