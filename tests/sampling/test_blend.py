from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from visiontune import adapters
from visiontune.sampling.blend import blended

PROMPTS = ["a red circle", "a blue square"]


def tuned(model, seed):
    found = adapters.attach(model.of("text"), "lora", targets=["q_proj", "v_proj"], name=f"set{seed}").eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return found


def picture(model, cond):
    empty = model.unconditional(len(cond))
    return model.pipe(
        prompt_embeds=cond.tokens,
        negative_prompt_embeds=empty.tokens,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_encoders_are_mixed_by_their_embeddings(family):
    model = tiny_model(family)
    with torch.no_grad():
        base = model.embed(PROMPTS)
    one, two = tuned(model, 1), tuned(model, 2)
    with torch.no_grad(), two.disable():
        first = model.embed(PROMPTS)
    with torch.no_grad(), one.disable():
        second = model.embed(PROMPTS)
    assert not torch.allclose(first.tokens, second.tokens)
    parts = ["tokens"] + (["pooled"] if base.pooled is not None else [])
    for name in parts:
        whole = [getattr(cond, name) for cond in (base, first, second)]
        for weights, expected in (
            ({one: 0.0, two: 0.0}, whole[0]),
            ({one: 1.0, two: 0.0}, whole[1]),
            ({two: 1.0, one: 0.0}, whole[2]),
        ):
            assert torch.equal(getattr(blended(model, PROMPTS, weights), name), expected)
        mixed = getattr(blended(model, PROMPTS, {one: 0.5, two: 0.2}), name)
        torch.testing.assert_close(mixed, 0.3 * whole[0] + 0.5 * whole[1] + 0.2 * whole[2], rtol=1e-5, atol=1e-6)
    assert one.enabled and two.enabled


def test_weight_zero_draws_the_picture_of_the_base_bit_for_bit():
    model = tiny_model("sd")
    with torch.no_grad():
        expected = picture(model, model.embed(PROMPTS))
    found = tuned(model, 1)
    with found.disable():
        assert (picture(model, blended(model, PROMPTS, {found: 0.0})) == expected).all()
        assert (picture(model, blended(model, PROMPTS, {found: 1.0})) == expected).all()
    assert (picture(model, blended(model, PROMPTS, {found: 1.0})) != expected).any()


def test_a_scale_is_of_the_weights_and_none_of_the_embeddings():
    model = tiny_model("sd")
    found = tuned(model, 1)
    half = blended(model, PROMPTS, {found: 0.5}).tokens
    found.scale = 0.5
    scaled = blended(model, PROMPTS, {found: 1.0}).tokens
    assert (half - scaled).abs().max() > 1e-4
    found.scale = 0.0
    with found.disable(), torch.no_grad():
        base = model.embed(PROMPTS).tokens
    assert torch.equal(blended(model, PROMPTS, {found: 1.0}).tokens, base)
