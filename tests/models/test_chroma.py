"""What Chroma has of its own: one token of padding that counts, and what diffusers does wrong made good."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import remade, tiny_model, tiny_pipe

from visiontune.core import Condition
from visiontune.errors import UserError
from visiontune.models.chroma import Chroma

PROMPTS = ["a", "a small green triangle left of the large red circle, in the photo of a blue square"]


def noise(model):
    return torch.randn(2, *model.latent_shape(16, 24), generator=torch.Generator().manual_seed(0))


def untouched(x_t, sigma, tokens):
    """The network as diffusers makes it, on patches of one row and the words of its own prompt, with nothing masked."""
    pipe = tiny_pipe("chroma")
    height, width = x_t.shape[-2] // 2, x_t.shape[-1] // 2
    places = pipe._prepare_latent_image_ids(1, height, width, "cpu", torch.float32)
    with torch.no_grad():
        return pipe.transformer(
            pipe._pack_latents(x_t, *x_t.shape),
            encoder_hidden_states=tokens,
            timestep=sigma,
            img_ids=places,
            txt_ids=torch.zeros(tokens.shape[1], 3),
        ).sample


def test_a_prompt_has_its_own_tokens_and_one_of_the_padding():
    model = tiny_model("chroma")
    cond = model.embed(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        ids = model.pipe.tokenizer(prompt, return_tensors="pt").input_ids
        count = ids.shape[1] + 1
        assert cond.mask[row].tolist() == [True] * count + [False] * (cond.mask.shape[1] - count)
        padded = torch.nn.functional.pad(ids, (0, 1), value=model.pipe.tokenizer.pad_token_id)
        expected = model.pipe.text_encoder(padded, attention_mask=torch.arange(count)[None] < count - 1)[0]
        torch.testing.assert_close(cond.tokens[row, :count], expected[0])
    assert cond.mask[1].all()
    long = model.embed(["a " * 600])
    assert long.tokens.shape[1] == model.reader.limit == 64 and long.mask.all()


def test_padding_reaches_neither_predictions_nor_the_stock_pipelines_pictures():
    model = tiny_model("chroma")
    x_t, found = noise(model), []
    hook = model.denoiser.register_forward_hook(lambda module, args, out: found.append(out[0].clone()))
    model.pipe(
        PROMPTS, num_inference_steps=1, guidance_scale=1.0, height=16, width=24, latents=model._stock_latents(x_t)
    )
    model.predict(x_t, torch.tensor(1000.0), model.embed(PROMPTS))
    hook.remove()
    for row, prompt in enumerate(PROMPTS):
        expected = untouched(x_t[row : row + 1], torch.ones(1), model.embed([prompt]).tokens)
        for patches in found:
            torch.testing.assert_close(patches[row : row + 1], expected, rtol=0, atol=1e-5)
    assert len(found) == 2


def test_time_is_exact_in_reduced_precision():
    exact, model = tiny_model("chroma"), tiny_model("chroma")
    cond, x_t, t = exact.embed(PROMPTS), noise(exact), torch.tensor(875.0)
    expected = exact.predict(x_t, t, cond)
    half = model.at(torch.bfloat16).predict(x_t, t, cond)
    model.pipe.to(torch.bfloat16)
    for found in (half, model.predict(x_t, t, cond)):
        assert 0 < (found - expected).norm() / expected.norm() < 0.02


def test_a_prediction_leaves_the_network_as_it_was():
    model = tiny_model("chroma")
    model.denoiser.enable_gradient_checkpointing()
    before = model.denoiser._gradient_checkpointing_func
    with pytest.raises(RuntimeError, match="shape"):
        model.predict(noise(model), torch.tensor(1.0), Condition(tokens=torch.ones(2, 3, 5)))
    model.predict(noise(model), torch.tensor(1.0), model.embed(PROMPTS))
    embedding = model.denoiser.time_text_embed
    assert not embedding._forward_hooks and not embedding._forward_pre_hooks
    assert model.denoiser._gradient_checkpointing_func is before


def test_what_is_no_text_to_image_checkpoint_is_refused():
    pipe = tiny_pipe("chroma")
    pipe.transformer = remade(pipe.transformer, in_channels=33)
    with pytest.raises(UserError, match="its transformer takes 33 channels"):
        Chroma(pipe)
    pipe = tiny_pipe("chroma")
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="its scheduler is not one of flow"):
        Chroma(pipe)
