"""What the families share: latent scaling as VAEs declare it, float16 VAEs, fingerprints."""

from __future__ import annotations

import pytest
import torch
from tiny import remade, tiny_model, tiny_pipe

from visiontune.core import Condition
from visiontune.diffusion.guidance import classifier_free, guided
from visiontune.errors import UserError
from visiontune.models.sd import StableDiffusion
from visiontune.models.sdxl import StableDiffusionXL


def pixels(size=16):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_channelwise_latent_statistics_are_those_of_the_stock_pipeline():
    mean, std = [0.1, -0.2, 0.3, 0.5], [0.5, 1.0, 2.0, 3.0]
    pipe = tiny_pipe("sdxl")
    pipe.vae = remade(pipe.vae, latents_mean=mean, latents_std=std, scaling_factor=0.13)
    model = StableDiffusionXL(pipe)
    z = model.vae.encode(pixels()).latent_dist.mode()
    expected = (z - torch.tensor(mean).view(1, 4, 1, 1)) * 0.13 / torch.tensor(std).view(1, 4, 1, 1)
    latents = model.encode(pixels(), sample=False)
    torch.testing.assert_close(latents, expected)

    decoded = []
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda module, args: decoded.append(args[0].clone()))
    pipe.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 8, 8)
    final = pipe("a", latents=start, num_inference_steps=1, output_type="latent", guidance_scale=1.0).images
    pipe("a", latents=start, num_inference_steps=1, output_type="pt", guidance_scale=1.0)
    model.decode(final)
    hook.remove()
    torch.testing.assert_close(decoded[1], decoded[0])


def test_shift_factor_is_taken_off_before_scaling():
    pipe = tiny_pipe()
    pipe.vae = remade(pipe.vae, shift_factor=0.25, scaling_factor=2.0)
    model = StableDiffusion(pipe)
    z = model.vae.encode(pixels()).latent_dist.mode()
    torch.testing.assert_close(model.encode(pixels(), sample=False), (z - 0.25) * 2.0)
    torch.testing.assert_close(model.decode((z - 0.25) * 2.0), model.vae.decode(z).sample, rtol=1e-4, atol=1e-5)


def test_a_float16_vae_is_computed_in_float32_and_left_as_it_is():
    """Published SDXL VAEs overflow in float16; here the first convolution is blown up to do the same."""
    model = tiny_model("sd")
    with torch.no_grad():
        model.vae.encoder.conv_in.weight.mul_(1e5)
    exact = model.encode(pixels(), sample=False)
    model.vae.half()
    latents = model.encode(pixels(), sample=False)
    assert model.vae.dtype == torch.float16
    assert latents.isfinite().all()
    reference = tiny_model("sd")
    reference.vae.load_state_dict(model.vae.state_dict())
    torch.testing.assert_close(latents, reference.encode(pixels(), sample=False))
    assert exact.isfinite().all()


def test_encoders_of_other_precision_have_other_fingerprints_and_the_denoiser_does_not():
    model = tiny_model("sd")
    before = {part: model.fingerprint(part) for part in ("vae", "text", "denoiser")}
    model.pipe.to(torch.bfloat16)
    assert [part for part in before if model.fingerprint(part) != before[part]] == ["vae", "text"]


def test_a_change_in_a_thirtieth_of_one_tensor_shows():
    model = tiny_model("sd")
    before = model.fingerprint("denoiser")
    weight = model.denoiser.mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight
    with torch.no_grad():
        weight.view(-1)[-weight.numel() // 30 :] += 0.5
    assert model.fingerprint("denoiser") != before


def test_the_text_fingerprint_sees_new_tokens():
    import copy

    model = tiny_model("sd")
    before = model.fingerprint("text")
    model.pipe.tokenizer = copy.deepcopy(model.pipe.tokenizer)
    model.pipe.tokenizer.add_tokens(["<bumble>"])
    assert model.fingerprint("text") != before


def test_an_unknown_part_has_no_fingerprint():
    with pytest.raises(UserError, match="has no part 'transformer'"):
        tiny_model("sd").fingerprint("transformer")
    assert tiny_model("sd").fingerprint("unet") == tiny_model("sd").fingerprint("denoiser")


def test_moving_gives_the_model_back():
    model = tiny_model("sd")
    assert model.to("cpu") is model
    assert model.device == torch.device("cpu")


def test_a_wrapped_denoiser_is_called_and_saved_under_the_same_prefix():
    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return (2 * self.inner(*args, **kwargs)[0],)

    model = tiny_model("sd")
    cond, x_t, t = model.embed(["a"]), torch.ones(1, 4, 8, 8), torch.tensor([7])
    plain = model.predict(x_t, t, cond)
    model.pipe.unet = Doubled(model.denoiser)
    torch.testing.assert_close(model.predict(x_t, t, cond), 2 * plain)
    assert list(model.networks()) == ["unet", "vae", "text_encoder"]
    assert model.networks()["unet"] is model.denoiser


class TestSDXL:
    def test_sizes_given_per_row_take_the_place_of_the_latents_size(self):
        model = tiny_model("sdxl")
        x_t, t, cond = torch.ones(2, 4, 8, 8), torch.tensor([7, 7]), model.embed(["a", "a"])
        own = torch.tensor([[16.0, 16, 0, 0, 16, 16], [640, 480, 12, 0, 16, 16]])
        sized = Condition(tokens=cond.tokens, pooled=cond.pooled, extra={"time_ids": own})
        plain, given = model.predict(x_t, t, cond), model.predict(x_t, t, sized)
        torch.testing.assert_close(plain[0], given[0], rtol=0, atol=1e-5)
        assert (plain[1] - given[1]).abs().max() > 1e-4
        assert guided(model, x_t, t, sized, None, classifier_free(2.0)).shape == x_t.shape

    def test_the_empty_condition_is_zero_only_if_the_checkpoint_says_so(self):
        model = tiny_model("sdxl")
        assert model.unconditional(3).tokens.shape == (3, 32, 64)
        assert not model.unconditional(1).tokens.any()
        assert not model.unconditional(1).pooled.any()
        model.pipe.register_to_config(force_zeros_for_empty_prompt=False)
        torch.testing.assert_close(model.unconditional(1).tokens, model.embed([""]).tokens)

    def test_a_condition_without_pooled_vector_is_refused(self):
        model = tiny_model("sdxl")
        cond = Condition(tokens=model.embed(["a"]).tokens)
        with pytest.raises(ValueError, match="make the Condition with embed"):
            model.predict(torch.ones(1, 4, 8, 8), torch.tensor([1]), cond)
