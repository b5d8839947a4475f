"""What HiDream has of its own: experts that gradients must pass, pictures of one area, a Llama that may be missing."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tiny import tiny_model, tiny_pipe

from visiontune import models
from visiontune.adapters import attach
from visiontune.core import Request
from visiontune.diffusion.guidance import NO_GUIDANCE
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.errors import UserError
from visiontune.models.hidream import HiDream

REQUEST = Request(prompt="a red circle", seed=1)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def inputs(model):
    noise = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return noise, torch.tensor([200.0, 900.0]), model.embed(["a red circle", "blue"])


def gradients(network, out, x):
    """Of a sum of squares, which asks nothing of the order of `out`: of what went in, and of each expert's weights."""
    out.square().sum().backward()
    return [x.grad, *(p.grad for name, p in network.named_parameters() if ".experts." in name)]


def test_gradients_pass_the_experts_as_they_do_in_the_stock_networks_training_mode():
    model, stock = tiny_model("hidream"), tiny_pipe("hidream").transformer.requires_grad_(True).train()
    x_t, t, cond = inputs(model)
    theirs, ours = x_t.clone().requires_grad_(), x_t.clone().requires_grad_()
    packed = stock(
        hidden_states=theirs,
        timesteps=t,
        encoder_hidden_states_t5=cond.tokens,
        encoder_hidden_states_llama3=cond.extra["llama"].movedim(1, 0),
        pooled_embeds=cond.pooled,
    ).sample
    model.denoiser.requires_grad_(True)
    found = gradients(model.denoiser, model.predict(ours, t, cond), ours)
    assert len(found) == 1 + 2 * 3 * 3 and all(grad.abs().sum() > 0 for grad in found)
    torch.testing.assert_close(found, gradients(stock, packed, theirs))
    assert not model.denoiser.training and not any(module.training for module in model.denoiser.modules())


def test_training_mode_and_gradients_change_no_prediction():
    model = tiny_model("hidream")
    x_t, t, cond = inputs(model)
    expected = model.predict(x_t, t, cond)
    with torch.no_grad():
        torch.testing.assert_close(model.predict(x_t, t, cond), expected, rtol=0, atol=1e-6)
    model.denoiser.train()
    torch.testing.assert_close(model.predict(x_t, t, cond), expected, rtol=0, atol=1e-6)


def test_routed_experts_are_trained_by_the_preset_all_alone():
    model = tiny_model("hidream")
    for preset, routed, shared in (("attention", 0, 0), ("attention+ff", 0, 6), ("all", 18, 6)):
        found = attach(model.of("denoiser"), "lora", targets=preset, presets=model.presets())
        assert sum(".experts." in name for name in found.layers) == routed
        assert sum(".shared_experts." in name for name in found.layers) == shared
        model.predict(*inputs(model)).square().mean().backward()
        moved = [p.grad.abs().sum() > 0 for name, p in found.named_parameters() if name.endswith("up")]
        assert len(moved) == len(found.layers) and all(moved)
        found.detach()


def test_a_size_that_the_pipeline_would_turn_into_another_is_refused_with_the_one_that_it_draws():
    model = tiny_model("hidream")
    drawn = model.pipe("a", height=8, width=8, num_inference_steps=1, guidance_scale=1.0, output_type="pt").images
    assert drawn.shape[-2:] == (16, 16)
    for size in ((16, 16), (16, 24), (24, 16)):
        assert model.size(*size) == size
    with pytest.raises(UserError, match="20x20 pixels in any shape, and 8x8 would become another size: take 16x16"):
        model.size(8, 8)
    with pytest.raises(UserError, match="24x24 pixels are 9 patches of 8x8, and the model reads 6: take less"):
        model.check_area(24, 24)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        UniPCMultistepScheduler(flow_shift=3.0, **FLOW),
        UniPCMultistepScheduler(use_dynamic_shifting=True, **FLOW),
    ],
    ids=["dynamic", "unipc", "dynamic unipc"],
)
def test_steps_stand_where_the_pipelines_do(scheduler):
    pipe = tiny_pipe("hidream")
    pipe.scheduler = scheduler
    model = HiDream(pipe)
    noise, _, cond = inputs(model)
    ours = rollout(model, cond[0], chain=4, start=Start(latents=noise[:1])).final
    pipe.scheduler = model.sampler("euler")
    options = {"num_inference_steps": 4, "height": 16, "width": 16, "guidance_scale": 1.0}
    found = pipe("a red circle", latents=noise[:1], output_type="latent", **options).images
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)
    pipe.scheduler = scheduler
    far = model.draw([REQUEST], steps=8, guidance=NO_GUIDANCE)
    for name in model.samplers():
        assert abs(model.draw([REQUEST], steps=8, guidance=NO_GUIDANCE, sampler=name) - far).mean() < 0.2 * far.std()


def test_a_pipeline_without_its_llama_is_refused(tmp_path):
    pipe = tiny_pipe("hidream")
    pipe.register_modules(text_encoder_4=None, tokenizer_4=None)
    pipe.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="it lacks its Llama: open the pipeline by diffusers with tokenizer_4"):
        models.load(str(tmp_path / "bare"))
