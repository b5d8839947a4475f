"""Control: what diffusers' own control pipelines draw, with one net and with several, and what is refused."""

from __future__ import annotations

import functools
import inspect

import diffusers
import numpy as np
import pytest
import torch
from control_nets import adapter, controlnet
from PIL import Image
from tiny import tiny_model

from visiontune.core import Request
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.errors import UserError
from visiontune.guidance import cfg, control
from visiontune.guidance._network import Network
from visiontune.guidance.base import Point, Run
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load

STEPS = 3
PROMPTS = ["a red circle", "green triangle"]
LINES = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
RINGS = Image.radial_gradient("L").resize((16, 16)).convert("RGB")
PIPELINES = {
    ("sd", "ControlNet"): "StableDiffusionControlNetPipeline",
    ("sdxl", "ControlNet"): "StableDiffusionXLControlNetPipeline",
    ("sd", "T2I-Adapter"): "StableDiffusionAdapterPipeline",
    ("sdxl", "T2I-Adapter"): "StableDiffusionXLAdapterPipeline",
}


@functools.cache
def model(family="sd"):
    made = tiny_model(family)
    made.pipe.scheduler = made.sampler(made.samplers()[0])
    return made


@functools.cache
def net(family, kind, seed=1):
    return controlnet(model(family).denoiser, seed) if kind == "ControlNet" else adapter(seed)


def noise(made):
    return torch.randn(2, *made.latent_shape(), generator=torch.Generator().manual_seed(7))


def drawn(pipe, made, **options):
    """Pictures, with guidance, from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "np", **options}
    negative = {"negative_prompt": ["small"] * 2}
    return pipe(PROMPTS, **negative, num_inference_steps=STEPS, latents=noise(made), **options).images


def stock(family, kind, nets, pictures, **options):
    """What diffusers' pipeline for such nets draws."""
    made, name = model(family), PIPELINES[family, kind]
    of_nets = {"controlnet" if kind == "ControlNet" else "adapter": nets if len(nets) > 1 else nets[0]}
    if kind != "ControlNet" and len(nets) > 1:
        of_nets = {"adapter": diffusers.MultiAdapter(list(nets))}
    pipe_class = getattr(diffusers, name)
    known = inspect.signature(pipe_class.__init__).parameters
    parts = {key: part for key, part in made.pipe.components.items() if key in known}
    checker = {"requires_safety_checker": False} if family == "sd" else {}
    pipe = pipe_class(**parts, **of_nets, **checker)
    # ControlNet pipelines take one picture for all rows, adapters one for each.
    shown = pictures if kind == "ControlNet" else [[picture] * 2 for picture in pictures]
    return drawn(pipe, made, image=shown if len(nets) > 1 else shown[0], **options)


@pytest.mark.parametrize(("family", "kind"), PIPELINES)
def test_it_draws_what_the_pipeline_of_such_a_net_draws(family, kind):
    made, one = model(family), net(family, kind)
    weight = "controlnet_conditioning_scale" if kind == "ControlNet" else "adapter_conditioning_scale"
    expected = stock(family, kind, [one], [LINES], **{weight: 0.7})
    term = control.Config(net=one, picture=LINES, scale=0.7)
    with GuidanceStack([term]).attach(made.pipe):
        found = drawn(made.pipe, made)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.abs(found - drawn(made.pipe, made)).max() > 1e-2
    # A rollout, with the stack's own guidance, ends there, too.
    cond, uncond = made.embed(PROMPTS), made.embed(["small"] * 2, negative=True)
    options = {"guidance": GuidanceStack([cfg.Config(scale=3.0), term]), "chain": STEPS}
    with torch.no_grad():
        ours = rollout(made, cond, uncond=uncond, start=Start(latents=noise(made)), **options).final
        pixels = (made.decode(ours) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ControlNet", "T2I-Adapter"])
def test_several_add_up_as_in_the_wrapper_of_several(kind):
    nets = [net("sd", kind, seed) for seed in (1, 2)]
    weight = "controlnet_conditioning_scale" if kind == "ControlNet" else "adapter_conditioning_scale"
    expected = stock("sd", kind, nets, [LINES, RINGS], **{weight: [0.7, 1.2]})
    terms = [
        control.Config(net=one, picture=picture, scale=scale)
        for one, picture, scale in zip(nets, (LINES, RINGS), (0.7, 1.2), strict=True)
    ]
    with GuidanceStack(terms).attach(model().pipe):
        found = drawn(model().pipe, model())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_its_window_is_that_of_a_pipeline_in_levels_of_noise():
    made, one = model(), net("sd", "ControlNet")
    levels = made.chain(STEPS, made.latent_shape())[0] / made.schedule.num_train_timesteps
    term = control.Config(net=one, picture=LINES, window=(float(levels[1:].mean()), 1.0))
    expected = stock("sd", "ControlNet", [one], [LINES], control_guidance_end=2 / 3)
    with GuidanceStack([term]).attach(made.pipe):
        found = drawn(made.pipe, made)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert "in 2 of the steps" in GuidanceStack([term]).plan(made, STEPS).total()


def test_rows_have_strengths_of_their_own_and_gradients_go_through_the_net():
    """Against the UNet called with what the ControlNet gives, in float64."""
    made, one = model(), net("sd", "ControlNet")
    made.denoiser.double()
    try:
        cond = made.embed(PROMPTS)
        words = cond.tokens.double()
        x, t = noise(made).double().requires_grad_(), torch.tensor([700, 300])
        term = control.Config(net=one, picture=LINES, window=(0.5, 1.0), scale=0.7)
        stack = GuidanceStack([term]).begin(made)
        found = stack(made.predict, x, t, t / 1000, type(cond)(tokens=words), None)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
        pixels = torch.from_numpy(np.array(LINES)).permute(2, 0, 1)[None].float().div(255).double().repeat(2, 1, 1, 1)
        down, middle = one(x, t, words, pixels, return_dict=False)
        strength = torch.tensor([0.7, 0.0], dtype=torch.float64).view(2, 1, 1, 1)
        added = [skip * strength for skip in down], middle * strength
        names = ("down_block_additional_residuals", "mid_block_additional_residual")
        expected = made.denoiser(x, t, words, **dict(zip(names, added, strict=True))).sample
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-8, atol=1e-10)
    finally:
        made.denoiser.float()
        one.float()


def test_an_adapter_sees_its_picture_once_a_run_and_of_a_region_the_part_that_is_its():
    made, grey = model(), adapter(3, inputs=1)
    seen = []
    grey.adapter.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    term, network = control.Config(net=grey, picture=LINES), Network.of_model(made)
    term.check(network)
    seen.clear()
    x, run = torch.zeros(1, 4, 4, 8), Run(shape=(4, 8, 8))
    point = Point(x=x, t=torch.tensor([500]), levels=[0.5], schedule=made.schedule, run=run, place=(2, 0))
    for _ in range(2):
        term.features(network, {"sample": x}, point)
    *blank, shown = seen
    assert all(not one.any() for one in blank)  # those that it is measured by
    assert shown.shape == (1, 1, 8, 16)
    whole = torch.from_numpy(np.array(LINES.convert("L"))).float() / 255
    assert torch.equal(shown[0, 0], whole[4:12])
    assert "next to nothing" in GuidanceStack([term]).plan(made, STEPS).total()


def test_a_net_is_opened_by_its_folder_and_the_pocket_ones_by_their_names(tmp_path):
    for kind in ("ControlNet", "T2I-Adapter"):
        one = net("sd", kind)
        one.save_pretrained(tmp_path / kind)
        term = control.Config(net=str(tmp_path / kind), picture=LINES)
        request = [Request(prompt="a red circle", seed=0)]
        found, expected = (
            model().draw(request, steps=1, guidance=GuidanceStack([each]))
            for each in (term, control.Config(net=one, picture=LINES))
        )
        # Some processors round by where weights lie, and those that are read from a file lie elsewhere.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    pocket = load("pocket/sd")
    for name in ("sketch", "colors"):
        control.Config(net=f"pocket/{name}", picture=LINES).check(Network.of_model(pocket))


def test_what_cannot_be_is_said(tmp_path):
    def refused(message, family="sd", **options):
        with pytest.raises(UserError, match=message):
            stack = GuidanceStack([control.Config(**{"picture": LINES, **options})])
            stack.plan(model(family), STEPS)

    one = net("sd", "ControlNet")
    refused("control is for UNets", "sd3", net=one)
    refused("net must be a ControlNetModel or a T2IAdapter of diffusers.*not a int", net=3)
    refused("several are several terms", net=diffusers.MultiAdapter([adapter(1), adapter(2)]))
    refused("made for another base than 'tiny-sdxl', with cross_attention_dim 32 and not 64", "sdxl", net=one)
    refused(r"another base than 'tiny-sd': its levels have \[16, 24\] channels", net=adapter(1, channels=(16, 24)))
    refused(r"its levels have \[16, 32, 32, 32\] channels", net=adapter(1, channels=(16, 32, 32, 32)))
    refused("there is no pocket model 'pocket/sketches'; did you mean 'pocket/sketch'", net="pocket/sketches")
    refused("cannot be loaded by diffusers", net=str(tmp_path))
    model().denoiser.save_pretrained(tmp_path / "unet")
    refused("is a UNet2DConditionModel: give a ControlNetModel or a T2IAdapter", net=str(tmp_path / "unet"))
    refused("control: picture must be a file", net=one, picture=3)
    refused("control: picture has 32x16 pixels, which is another ratio", net=one, picture=LINES.resize((32, 16)))
