"""What every family of continuous latents owes: it computes what the stock pipeline of its class computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_model
from torch import nn

from visiontune.adapters import attach
from visiontune.core import Condition
from visiontune.diffusion.guidance import classifier_free, guided
from visiontune.diffusion.trajectory import Start, Window, rollout
from visiontune.diffusion.transition import DDIM
from visiontune.models import families
from visiontune.models.diffusion import DiffusionModel

PROMPTS = ["a red circle above a blue square", "green triangle"]
SIZE = {"height": 16, "width": 24}  # not square, so that swapped sides would show
FAMILIES = sorted(name for name, cls in families().items() if issubclass(cls, DiffusionModel))
CASES = [(family, {}) for family in FAMILIES] + [("sd", {"prediction_type": "v_prediction"})]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *case[1].values()]))
def model(request):
    family, options = request.param
    made = tiny_model(family, **options)
    made.pipe.scheduler = DDIMScheduler.from_config(made.pipe.scheduler.config, clip_sample=False)
    return made


def noise(model, seed=0):
    shape = (len(PROMPTS), model.latent_channels, *(side // model.downsample for side in SIZE.values()))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stock(model, output="latent", **options):
    """Run the stock pipeline; its output, and the denoiser's first call as (arguments, result)."""
    calls = []
    hook = model.denoiser.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(((*args, kwargs), out[0].clone())), with_kwargs=True
    )
    options = {"latents": noise(model), "num_inference_steps": 3, **SIZE, **options}
    images = model.pipe(PROMPTS, output_type=output, **options).images
    hook.remove()
    return images, calls[0]


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_predict_is_the_first_call_of_the_stock_pipeline(model, cfg_scale):
    _, ((x_t, t, kwargs), expected) = stock(model, guidance_scale=cfg_scale)
    cond = model.embed(PROMPTS)
    if cfg_scale > 1:
        cond = Condition.cat([model.unconditional(len(PROMPTS)), cond])
    torch.testing.assert_close(cond.tokens, kwargs["encoder_hidden_states"], rtol=0, atol=1e-6)
    start, _ = model.schedule.timesteps(3)
    assert t == start[0]
    ours = noise(model).repeat(len(cond) // len(PROMPTS), 1, 1, 1)
    torch.testing.assert_close(ours, x_t)
    pred = model.predict(ours, start[:1].expand(len(cond)), cond)
    assert pred.std() > 0.01
    torch.testing.assert_close(pred, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_rollout_and_decode_give_the_images_of_the_stock_pipeline(model, cfg_scale):
    images, _ = stock(model, "pt", guidance_scale=cfg_scale)
    final = rollout(
        model, model.embed(PROMPTS), guidance=classifier_free(cfg_scale), chain=3, start=Start(latents=noise(model))
    ).final
    ours = (model.decode(final) / 2 + 0.5).clamp(0, 1)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-5)


def test_stochastic_rollout_with_negative_prompt_gives_the_latents_of_the_stock_pipeline(model):
    options = {"guidance_scale": 3.0, "eta": 0.7, "negative_prompt": ["small", "a photo"]}
    expected, _ = stock(model, latents=None, generator=torch.Generator().manual_seed(5), **options)
    trajectory = rollout(
        model,
        model.embed(PROMPTS),
        uncond=model.embed(options["negative_prompt"]),
        guidance=classifier_free(3.0),
        chain=3,
        dynamics=DDIM(eta=0.7),
        start=Start(generator=torch.Generator().manual_seed(5), size=tuple(SIZE.values())),
    )
    torch.testing.assert_close(trajectory.final, expected, rtol=0, atol=1e-5)


def test_each_row_is_predicted_as_if_it_were_alone(model):
    cond, x_t, t = model.embed(PROMPTS), noise(model), torch.tensor([10, 800])
    together = model.predict(x_t, t, cond)
    for row in range(2):
        alone = model.predict(x_t[row : row + 1], t[row : row + 1], cond[row])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


def test_guidance_extrapolates_from_the_unconditional_prediction(model):
    cond, x_t, t = model.embed(PROMPTS), noise(model), torch.tensor([500, 500])
    given = model.predict(x_t, t, cond)
    without = model.predict(x_t, t, model.unconditional(2))
    assert torch.equal(guided(model, x_t, t, cond, None, classifier_free(1.0)), given)
    torch.testing.assert_close(
        guided(model, x_t, t, cond, None, classifier_free(2.0)), 2 * given - without, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(guided(model, x_t, t, cond, None, classifier_free(0.0)), without, rtol=0, atol=1e-5)


def test_unconditional_rows_can_take_the_place_of_rows(model):
    """Caption dropout and guidance join both kinds of condition in one batch."""
    joined = Condition.cat([model.embed(PROMPTS), model.unconditional(3)])
    assert len(joined) == 5
    torch.testing.assert_close(joined.tokens[2], joined.tokens[4])


def test_latents_are_those_of_the_vae(model):
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior = model.vae.encode(pixels).latent_dist
    scale = model.vae.config.scaling_factor
    torch.testing.assert_close(model.encode(pixels, sample=False), posterior.mode() * scale)
    expected = posterior.sample(torch.Generator().manual_seed(3)) * scale
    torch.testing.assert_close(model.encode(pixels, generator=torch.Generator().manual_seed(3)), expected)

    moments = model.moments(pixels)
    mean, std = moments.chunk(2, dim=1)
    torch.testing.assert_close((mean, std), (posterior.mean, posterior.std))
    torch.testing.assert_close(model.latents_from_moments(moments), posterior.mode() * scale)
    eps = torch.randn_like(mean)
    torch.testing.assert_close(model.latents_from_moments(moments, eps), (mean + std * eps) * scale)

    z = posterior.mode()
    torch.testing.assert_close(model.decode(z * scale), model.vae.decode(z).sample, rtol=1e-4, atol=1e-5)
    assert mean.shape == (2, model.latent_channels, 16 // model.downsample, 16 // model.downsample)


def test_gradients_reach_latents_prompts_and_start(model):
    assert not any(p.requires_grad for m in model.networks().values() for p in m.parameters())
    assert not model.embed(PROMPTS).tokens.requires_grad

    latents = noise(model).requires_grad_()
    model.decode(latents).square().mean().backward()
    assert latents.grad.abs().sum() > 0

    for name, encoder in model.of("text").items():
        encoder.requires_grad_(True)
        cond = model.embed(PROMPTS)
        model.predict(noise(model), torch.tensor([5, 500]), cond).square().mean().backward()
        grads = [p.grad for key, p in encoder.named_parameters() if "q_proj" in key and "layers.0" in key]
        assert grads and all(g is not None and g.abs().sum() > 0 for g in grads), name
        encoder.requires_grad_(False)


def test_rollout_differentiates_its_last_steps(model):
    cond = model.embed(PROMPTS)
    tokens = cond.tokens.clone().requires_grad_()
    cond = replace(cond, tokens=tokens)
    assert not rollout(model, cond, chain=3, start=Start(latents=noise(model))).final.requires_grad
    grads = []
    for grad_steps in (1, 3):
        final = rollout(model, cond, chain=3, start=Start(latents=noise(model)), window=Window(steps=grad_steps)).final
        grads.append(torch.autograd.grad(final.square().mean(), tokens)[0])
    assert grads[0].abs().sum() > 0
    assert not torch.allclose(grads[0], grads[1])


def test_presets_choose_their_kind_of_layer_in_every_component(model):
    text = list(model.of("text"))
    for names in (["unet"], text, list(model.networks())):
        modules = {name: model.networks()[name] for name in names}
        presets = model.presets(names)
        assert set(presets) == {"attention", "attention+ff", "conv", "all"}
        counts = {}
        for preset in ("attention", "attention+ff", "all"):
            adapters = attach(modules, "lora", targets=preset, presets=presets)
            counts[preset] = len(adapters.layers)
            adapters.detach()
        every = sum(isinstance(m, nn.Linear | nn.Conv2d) for root in modules.values() for m in root.modules())
        assert 0 < counts["attention"] < counts["attention+ff"] <= counts["all"] == every
    attention = attach(
        model.of("denoiser", "text"), "lora", targets="attention", presets=model.presets(model.networks())
    )
    assert {name.split(".")[0] for name in attention.layers} == {"unet", *text}
    attention.detach()
    convolutions = attach({"unet": model.denoiser}, "lora", targets="conv", presets=model.presets())
    assert len(convolutions.layers) == sum(isinstance(m, nn.Conv2d) for m in model.denoiser.modules())
    convolutions.detach()
    assert not model.presets(text)["conv"]


@pytest.mark.parametrize("part", ["vae", "text", "denoiser"])
def test_fingerprint_tells_weights_apart(model, part):
    before = {name: model.fingerprint(name) for name in ("vae", "text", "denoiser")}
    other = tiny_model(model.family)
    assert other.fingerprint(part) == before[part]
    modules = {"vae": [model.vae], "denoiser": [model.denoiser], "text": list(model.of("text").values())}
    with torch.no_grad():
        next(modules[part][-1].parameters()).mul_(1.1)
    assert {name for name in before if model.fingerprint(name) != before[name]} == {part}


def test_low_precision_model_takes_and_gives_float32(model):
    cond, x_t, t = model.embed(PROMPTS), noise(model), torch.tensor([5, 500])
    exact = model.predict(x_t, t, cond)
    base = model.fingerprint("denoiser")
    model.pipe.to(torch.bfloat16)
    pred = model.predict(x_t, t, cond)
    assert (pred.dtype, model.dtype) == (torch.float32, torch.bfloat16)
    assert (pred - exact).norm() / exact.norm() < 0.05
    assert model.fingerprint("denoiser") == base
    assert model.decode(x_t).dtype == model.encode(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
