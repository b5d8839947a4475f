"""Sampling through the stock pipeline: pairs, reproducibility, and leaving the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_model

from visiontune import adapters
from visiontune.core import Request
from visiontune.diffusion.guidance import CFG
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.models.pipeline import own_generator
from visiontune.sampling.generate import images
from visiontune.sampling.pipeline import pair

PROMPTS = ["a red circle", "a blue square", "a green triangle"]


def noise_of(prompt: str, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=own_generator(Request(prompt=prompt, seed=seed)))


@pytest.fixture(scope="module")
def model():
    return tiny_model("sd")


def test_equals_a_plain_call_of_the_diffusers_pipeline(model) -> None:
    noise = torch.stack([noise_of(p, s, (4, 8, 8)) for p, s in zip(PROMPTS, (1, 2, 3), strict=True)])
    expected = model.pipe(PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=5.0, output_type="pil").images
    got = images(model, PROMPTS, [1, 2, 3], steps=3, cfg_scale=5.0)
    np.testing.assert_array_equal(got, np.stack([np.asarray(image) for image in expected]))
    assert got.dtype == np.uint8
    assert got.shape == (3, 16, 16, 3)


def test_same_bits_again_and_only_rounding_between_batch_sizes(model) -> None:
    torch.manual_seed(1)
    first = images(model, PROMPTS, [5, 5, 9], steps=3)
    torch.manual_seed(2)
    np.testing.assert_array_equal(images(model, PROMPTS, [5, 5, 9], steps=3), first)
    for batch_size in (1, 2):
        other = images(model, PROMPTS, [5, 5, 9], steps=3, batch_size=batch_size)
        assert np.abs(other.astype(int) - first).max() <= 1
    turned = images(model, PROMPTS[::-1], [9, 5, 5], steps=3)[::-1]
    assert np.abs(turned.astype(int) - first).max() <= 1


def test_noise_belongs_to_prompt_and_seed() -> None:
    def noise(prompt: str, seed: int) -> torch.Tensor:
        return noise_of(prompt, seed, (4, 64, 64))

    torch.testing.assert_close(noise("a", 1), noise("a", 1), atol=0, rtol=0)
    for other in (noise("b", 1), noise("a", 2), noise("a", -1)):
        correlation = torch.corrcoef(torch.stack([noise("a", 1).flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.05
    assert abs(noise("a", 1).mean()) < 0.05
    assert abs(noise("a", 1).std() - 1) < 0.05


def test_negative_prompt_and_guidance_act(model) -> None:
    plain = images(model, PROMPTS[:1], [0], steps=2)
    assert (images(model, PROMPTS[:1], [0], steps=2, negative_prompt="blue") != plain).any()
    assert (images(model, PROMPTS[:1], [0], steps=2, cfg_scale=1.0) != plain).any()


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("sd")
    scheduler = model.pipe.scheduler
    dropout = torch.nn.Dropout(0.5)
    model.denoiser.conv_in.add_module("dropout", dropout.train())
    model.pipe.set_progress_bar_config(leave=False)
    seen = []
    model.denoiser.register_forward_pre_hook(lambda *_: seen.append((dropout.training, torch.is_grad_enabled())))
    images(model, "a red circle", [0, 1], steps=2, scheduler="euler")
    assert set(seen) == {(False, False)}
    assert dropout.training
    assert not model.denoiser.training
    assert model.pipe.scheduler is scheduler
    assert model.pipe._progress_bar_config == {"leave": False}
    model.denoiser.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        images(model, "a red circle", 0, steps=2)
    assert model.pipe.scheduler is scheduler
    assert dropout.training


def test_attached_adapters_act_in_place() -> None:
    model = tiny_model("sd")
    before = images(model, PROMPTS, 3, steps=2)
    adapter = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q", "to_v"])
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    assert (images(model, PROMPTS, 3, steps=2) != before).any()
    with adapter.disable():
        np.testing.assert_array_equal(images(model, PROMPTS, 3, steps=2), before)


def test_dropout_of_an_adapter_in_training_is_off() -> None:
    model = tiny_model("sd")
    adapter = adapters.attach({"unet": model.denoiser}, "lora", targets="to_q", dropout=0.5)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    adapter.eval()
    expected = images(model, PROMPTS, 3, steps=2)
    adapter.train()
    np.testing.assert_array_equal(images(model, PROMPTS, 3, steps=2), expected)
    assert adapter.training


def test_sdxl_and_other_sizes() -> None:
    model = tiny_model("sdxl")
    got = images(model, PROMPTS[:2], [0, 1], steps=2, height=24, width=32, scheduler="model")
    assert got.shape == (2, 24, 32, 3)
    assert (got[0] != got[1]).any()
    with pytest.raises(UserError, match="multiples of 8, not 20 and 16"):
        images(model, PROMPTS, 0, height=20)


def test_every_sampler_of_the_family_draws_and_others_are_refused(model) -> None:
    made = {n: images(model, "a red circle", 0, steps=4, scheduler=n) for n in model.samplers()}
    assert set(made) == {"ddim", "euler", "dpm++", "unipc", "lcm", "model"}
    # The tiny pipeline's own scheduler is DDIM.
    np.testing.assert_array_equal(made["model"], made["ddim"])
    assert (made["dpm++"] != made["ddim"]).any()
    assert (made["euler"] != made["dpm++"]).any()
    with pytest.raises(UserError, match=r"'dim'.*ddim, euler"):
        images(model, "a", 0, scheduler="dim")


def test_a_stochastic_sampler_repeats_itself_row_by_row() -> None:
    from diffusers import DDPMScheduler

    model = tiny_model("sd")
    model.pipe.scheduler = DDPMScheduler.from_config(model.pipe.scheduler.config)
    together = images(model, PROMPTS, [1, 2, 3], steps=3)
    torch.manual_seed(1)
    alone = images(model, PROMPTS[1], 2, steps=3)
    assert np.abs(alone[0].astype(int) - together[1]).max() <= 1


def test_terms_stand_on_the_scale_or_in_its_place(model) -> None:
    call = {"seeds": 0, "steps": 2, "height": 16, "width": 16}

    def drawn(*specs, **options):
        return images(model, "a red circle", guidance=GuidanceStack.of(specs), **call, **options)

    plain = images(model, "a red circle", cfg_scale=3.0, **call)
    np.testing.assert_array_equal(drawn({"pag": 0}, cfg_scale=3.0), plain)
    np.testing.assert_array_equal(drawn({"cfg": 3}), plain)
    perturbed = drawn({"slg": 3}, cfg_scale=3.0)
    assert (perturbed != plain).any()
    np.testing.assert_array_equal(drawn({"slg": 3}, {"cfg": 3}), perturbed)


def test_guidance_off_some_levels_is_not_drawn_by_the_stock_pipeline(model) -> None:
    with pytest.raises(UserError, match="leave the interval out"):
        model.draw([Request(prompt="a")], steps=2, guidance=CFG(scale=3.0, interval=(0.2, 0.8)))


def test_pairs() -> None:
    assert pair("a", [1, 2]) == [("a", 1), ("a", 2)]
    assert pair(["a", "b"], 3) == [("a", 3), ("b", 3)]
    assert pair("a", 3) == [("a", 3)]
    with pytest.raises(UserError, match="2 prompts cannot be paired with 3 seeds"):
        pair(["a", "b"], [1, 2, 3])
    assert images(tiny_model("sd"), [], []).shape == (0, 16, 16, 3)


def test_numbers_that_are_not_finite_are_named() -> None:
    model = tiny_model("sd")
    with torch.no_grad():
        model.denoiser.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="'a red circle', seed 4 is not finite"):
        images(model, "a red circle", [4], steps=2)
