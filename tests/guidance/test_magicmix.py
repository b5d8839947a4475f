"""MagicMix: when it is img2img, when it is the layout, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from tiny import tiny_model

from visiontune.core import Request
from visiontune.diffusion.trajectory import Keep, Start, rollout
from visiontune.errors import UserError
from visiontune.guidance import cfg, magicmix
from visiontune.guidance.stack import GuidanceStack
from visiontune.models.pipeline import own_generator

PICTURE = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
REQUEST = Request(prompt="a red circle", seed=3)
STEPS = 10


@pytest.fixture(scope="module")
def model():
    made = tiny_model("sd")
    made.pipe.scheduler = made.sampler("ddim")
    return made


def drawn(made, **options):
    stack = GuidanceStack([cfg.Config(scale=3.0), magicmix.Config(picture=PICTURE, **options)])
    return made.draw([REQUEST], steps=STEPS, guidance=stack), stack


def test_without_mixing_it_is_img2img_from_k_max(model):
    found, stack = drawn(model, k_min=0.6, k_max=0.6)
    pixels = torch.from_numpy(np.asarray(PICTURE)).permute(2, 0, 1)[None] / 127.5 - 1
    components = {**model.pipe.components, "requires_safety_checker": False}
    stock = StableDiffusionImg2ImgPipeline(**components)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        "a red circle",
        image=model.encode(pixels, sample=False),
        strength=0.6,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=own_generator(REQUEST),
        output_type="np",
    ).images
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    # The steps above k_max are not computed.
    assert stack.plan(model, STEPS).rows == (0,) * 4 + (2,) * 6


def test_mixed_in_whole_the_latents_are_the_layout_noised_to_every_level(model):
    noise = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean = model.encode(torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None] / 127.5 - 1, sample=False)
        for share in (1.0, 0.25):
            stack = GuidanceStack([magicmix.Config(picture=PICTURE, scale=share, k_min=0.3, k_max=1.0)])
            found = rollout(
                model,
                model.embed(["a red circle"]),
                guidance=stack,
                chain=STEPS,
                start=Start(latents=noise),
                keep=Keep(history=True),
            )
            for i, t in enumerate(found.timesteps[:7]):  # down to .301
                layout = model.schedule.add_noise(clean, noise, t[None])
                if share == 1 or i == 0:
                    torch.testing.assert_close(found.latents[:, i], layout.float(), rtol=0, atol=1e-6)
                else:
                    assert (found.latents[:, i] - layout).abs().max() > 0.1
            assert (
                found.latents[:, 7] - model.schedule.add_noise(clean, noise, found.timesteps[7:8])
            ).abs().max() > 0.1


def test_what_it_cannot_do_is_said(model, tmp_path):
    with pytest.raises(UserError, match=r"k_min 0\.7 must not be above k_max 0\.5"):
        magicmix.Config(picture=PICTURE, k_min=0.7, k_max=0.5)
    with pytest.raises(UserError, match=r"gone\.png"):
        GuidanceStack.of([{"magicmix": {"picture": str(tmp_path / "gone.png")}}]).plan(model, STEPS)
    with pytest.raises(UserError, match="must be a file, or a picture of Pillow, not 3"):
        GuidanceStack.of([{"magicmix": {"picture": 3}}]).plan(model, STEPS)
    wide = GuidanceStack([magicmix.Config(picture=PICTURE.resize((32, 16)))])
    with pytest.raises(UserError, match="has 32x16 pixels, which is another ratio than that of the 16x16"):
        model.draw([REQUEST], steps=STEPS, guidance=wide)
