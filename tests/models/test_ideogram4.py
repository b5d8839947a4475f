"""What Ideogram 4 has of its own: a second network for rows without words, its steps, and its order of channels."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_pipe
from workshop import Workshop

from visiontune.adapters import attach
from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import CFG, guided
from visiontune.errors import UserError
from visiontune.models.ideogram4 import Ideogram4

PROMPT = "a red circle"
OPTIONS = {"num_inference_steps": 3, "height": 16, "width": 24, "guidance_schedule": None}


@pytest.fixture
def model():
    return tiny_model("ideogram4")


def noise(model, rows=2):
    return torch.randn(rows, *model.latent_shape(16, 24), generator=torch.Generator().manual_seed(0))


def test_rows_without_words_pass_the_other_network_whatever_is_beside_them(model):
    x_t, t = noise(model, 3), torch.tensor([200.0, 500.0, 900.0])
    cond = Condition.cat([model.unconditional(1), model.embed([PROMPT]), model.unconditional(1)])
    asked = {"transformer": [], "unconditional_transformer": []}
    for name, calls in asked.items():
        model.networks()[name].register_forward_hook(lambda _, args, out, calls=calls: calls.append(len(out[0])))
    together = model.predict(x_t, t, cond)
    assert asked == {"transformer": [1], "unconditional_transformer": [2]}
    for row in range(3):
        alone = model.predict(x_t[row : row + 1], t[row : row + 1], cond[row])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-6)


def test_guidance_needs_no_other_condition_and_is_the_usual_one(model):
    x_t, t, cond = noise(model), torch.tensor([300.0, 800.0]), model.embed([PROMPT, "blue"])
    found = guided(model, x_t, t, cond, None, model.guidance(4.0))
    assert not model.guidance(4.0).contrasts
    torch.testing.assert_close(found, guided(model, x_t, t, cond, model.unconditional(2), CFG(scale=4.0)))
    with pytest.raises(ValueError, match="needs conditions with a mask"):
        guided(model, x_t, t, Condition(tokens=cond.tokens), None, model.guidance(4.0))


def test_what_fills_a_prompt_up_changes_no_picture(model):
    latents = model._stock_latents(noise(model, 1))
    options = model._stock(model.guidance(3.0), [Request(prompt=PROMPT)])
    found = [
        model.pipe(PROMPT, latents=latents, output_type="pt", **{**OPTIONS, **options, **more}).images
        for more in ({}, {"max_sequence_length": 90})
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_steps_follow_the_pipelines_logit_normal_by_resolution(model):
    model.pipe(PROMPT, guidance_scale=1.0, max_sequence_length=32, output_type="latent", **OPTIONS)
    start, end = model.chain(3, model.latent_shape(16, 24))
    torch.testing.assert_close(torch.cat([start, end[-1:]]), model.pipe.scheduler.sigmas * 1000)
    assert (model.chain(3, model.latent_shape(64, 64))[0][1:] > start[1:]).all()


def test_its_shift_moves_the_logit_normal_of_512_pixels_to_that_of_another_size(model):
    plain, moved = (model.chain(6, model.latent_shape(side, side))[0][1:].double() / 1000 for side in (512, 1024))
    k = model.sampling_shift(model.latent_shape(1024, 1024))
    assert k == 2 and model.sampling_shift(model.latent_shape(512, 512)) == 1
    torch.testing.assert_close(moved, k * plain / (1 + (k - 1) * plain), rtol=0, atol=1e-6)


def test_channels_of_a_patch_are_in_the_order_of_its_pipeline(model):
    z = torch.arange(4 * 4 * 6).float().view(1, 4, 4, 6)
    patches = model._patched(z)
    assert patches.shape == (1, 16, 2, 3) and torch.equal(model._unpatched(patches), z)
    # Place in the patch by row and column, then channel.
    assert torch.equal(patches[0, :, 1, 2], z[0, :, 2:, 4:].permute(1, 2, 0).flatten())


def test_each_network_is_trained_by_rows_of_its_kind(model):
    x_t, t = noise(model), torch.tensor([300.0, 800.0])
    for part, learns, other in (
        ("denoiser", model.embed([PROMPT, "blue"]), model.unconditional(2)),
        ("unconditional", model.unconditional(2), model.embed([PROMPT, "blue"])),
    ):
        found = attach(model.of(part), "lora", targets="attention", presets=model.presets([part]))
        assert len(found.layers) == 8 and not model.predict(x_t, t, other).requires_grad
        model.predict(x_t, t, learns).square().mean().backward()
        assert all(p.grad.any() for name, p in found.named_parameters() if name.endswith("up"))
        found.detach()


def test_captions_are_dropped_only_where_the_other_network_is_trained(tmp_path):
    shop, dropped = Workshop("ideogram4", tmp_path), "data.caption_dropout=0.5"
    with pytest.raises(UserError, match=r"rows without a caption pass the unconditional_transformer of .* set it to 0"):
        shop.personalise("alone", dropped, "train.parts=[denoiser]")
    shop.personalise("both", dropped, "train.parts=[denoiser, unconditional]")
    shop.personalise("read", dropped, "train.parts=[denoiser, text_encoder]")


def test_what_it_cannot_take_is_refused(model):
    with pytest.raises(UserError, match="guides away from pictures without words: leave the negative prompt out"):
        model.draw([Request(prompt=PROMPT, negative="small")], steps=2, guidance=model.guidance(3.0))
    with pytest.raises(UserError, match=r"prompt '0{80}' has 4\d+ tokens, and 'tiny-ideogram4' reads 2048: shorten it"):
        model.embed(["a", "0" * 4000])
    pipe = tiny_pipe("ideogram4")
    pipe.scheduler.register_to_config(use_dynamic_shifting=True)
    with pytest.raises(UserError, match="its pipeline shifts no steps by resolution"):
        Ideogram4(pipe)
