"""Checkpoints that were distilled to few steps are known by their configuration or by their name."""

from __future__ import annotations

import pytest
from diffusers import EulerAncestralDiscreteScheduler
from tiny import tiny_model, tiny_pipe

from visiontune.errors import UserError
from visiontune.models import families
from visiontune.objectives import denoising, diffusion_dpo, dreambooth

CACHE = "~/.cache/huggingface/hub"


def ancestral(family, spacing):
    pipe = tiny_pipe(family)
    kind = EulerAncestralDiscreteScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    return families()[family](pipe, source="mine")


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (lambda: tiny_model("flux", schnell=True), "guidance_embeds"),
        (lambda: tiny_model("flux2", distilled=True), "is_distilled"),
        (lambda: tiny_model("krea2", distilled=True), "is_distilled"),
        (lambda: tiny_model("z_image", turbo=True), "shift of 3"),
        (lambda: ancestral("sd", "trailing"), "ancestral sampler"),
        (lambda: ancestral("sdxl", "trailing"), "ancestral sampler"),
        (lambda: ancestral("sdxl", "leading"), None),
        (lambda: tiny_model("flux"), None),
        (lambda: tiny_model("flux2"), None),
        (lambda: tiny_model("flux2", dev=True), None),
        (lambda: tiny_model("krea2"), None),
        (lambda: tiny_model("z_image"), None),
        (lambda: tiny_model("z_image", dynamic=True), None),
        (lambda: tiny_model("sd3"), None),
        (lambda: tiny_model("sd"), None),
    ],
)
def test_what_the_configuration_says(model, word):
    said = model().distilled
    assert word in said if word else said is None


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("stabilityai/stable-diffusion-3.5-large-turbo", "turbo"),
        ("models/RealVisXL_V4.0_Lightning/", "lightning"),
        ("someone/LCM_Dreamshaper_v7", "lcm"),
        ("someone/hypersd-merged", "hypersd"),
        ("someone/Qwen-Image-Distill-Full", "distill"),
        (f"{CACHE}/models--stabilityai--sdxl-turbo/snapshots/f8", "turbo"),
        ("stabilityai/stable-diffusion-3.5-large", None),
        ("turbo/base", None),
        ("/data/turbo/base", None),
        ("someone/calcmap", None),
        (f"{CACHE}/models--lightning--base/snapshots/f8", None),
    ],
)
def test_what_the_name_says(source, word):
    said = families()["sd3"](tiny_pipe("sd3"), source=source).distilled
    assert said == (f"its name says {word}" if word else None)


@pytest.mark.parametrize("name", ["Z-Image-De-Turbo", "z_image_deturbo", "turbo-undistilled", "turbo-de-distilled"])
def test_a_distillation_that_was_undone_again_is_none(name):
    pipe = tiny_pipe("z_image", turbo=True)
    assert families()["z_image"](pipe, source=f"someone/{name}").distilled is None
    assert families()["z_image"](pipe, source="someone/node-turbo").distilled


@pytest.mark.parametrize("objective", [denoising, dreambooth, diffusion_dpo])
def test_every_plain_denoising_loss_refuses_it_in_one_line_with_the_mends(objective):
    model = tiny_model("flux", schnell=True)
    with pytest.raises(UserError) as caught:
        objective.build(objective.Config()).check(model, None)
    said = str(caught.value)
    assert "\n" not in said and "tiny-flux" in said
    assert all(mend in said for mend in ("the model that it came from", "adapter.under=", "objective.distilled=true"))
    objective.build(objective.Config(distilled=True)).check(model, None)


def test_a_distilled_klein_guides_away_from_nothing_as_its_pipeline():
    plain, distilled = (tiny_model("flux2", distilled=told) for told in (False, True))
    assert plain.guidance(4.0).contrasts and not distilled.guidance(4.0).contrasts
