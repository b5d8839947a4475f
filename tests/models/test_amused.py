"""aMUSEd computes and draws what the stock pipeline does, and says what it cannot be used for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny import remade, tiny_model, tiny_pipe
from torch import nn

from visiontune import models
from visiontune.adapters import attach
from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import classifier_free
from visiontune.diffusion.unmask import guided_logits, unmask
from visiontune.errors import UserError
from visiontune.models.amused import Amused
from visiontune.models.pipeline import own_generator
from visiontune.objectives import denoising, diffusion_dpo, grpo
from visiontune.rewards.base import as_reward
from visiontune.sampling.pipeline import images
from visiontune.training import optim

PROMPTS = ["a red circle above a blue square", "green triangle"]
SIZE = {"height": 16, "width": 24}  # not square, so that swapped sides would show


@pytest.fixture
def model():
    return tiny_model("amused")


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def tokens_of(model, masked=0.5, seed=0):
    drawn = torch.randint(0, 16, (2, 4, 6), generator=seeded(seed))
    return torch.where(torch.rand(2, 4, 6, generator=seeded(seed + 1)) < masked, model.mask_token, drawn)


def stock(model, output, cfg_scale, **options):
    """The stock pipeline's pictures, and its denoiser's calls as (arguments, result)."""
    calls = []
    hook = model.denoiser.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(((*args, kwargs), out.clone())), with_kwargs=True
    )
    options = {"num_inference_steps": 4, "generator": seeded(), **SIZE, **options}
    found = model.pipe(PROMPTS, guidance_scale=cfg_scale, output_type=output, **options).images
    hook.remove()
    return found, calls


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_logits_are_those_of_the_stock_pipeline(model, cfg_scale):
    _, calls = stock(model, "latent", cfg_scale)
    cond = model.embed(PROMPTS)
    if cfg_scale > 1:
        cond = Condition.cat([model.unconditional(2), cond])
    assert calls[0][0][0].unique().tolist() == [model.mask_token]
    for (tokens, kwargs), expected in calls:
        torch.testing.assert_close(cond.tokens, kwargs["encoder_hidden_states"], rtol=0, atol=1e-6)
        torch.testing.assert_close(cond.pooled, kwargs["pooled_text_emb"], rtol=0, atol=1e-6)
        found = model.logits(tokens, cond)
        assert found.shape == (len(cond), 4, 6, 16) and found.std() > 0.1
        torch.testing.assert_close(found.permute(0, 3, 1, 2), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_unmasking_gives_the_tokens_and_pictures_of_the_stock_pipeline(model, cfg_scale, steps):
    given = {"num_inference_steps": steps}
    expected, _ = stock(model, "latent", cfg_scale, **given)
    shown, _ = stock(model, "pt", cfg_scale, **given)
    options = {"guidance": classifier_free(cfg_scale), "steps": steps, "size": tuple(SIZE.values())}
    found = unmask(model, model.embed(PROMPTS), generator=seeded(), **options)
    assert torch.equal(found, expected)
    assert len(found.unique()) > 5 and model.mask_token not in found
    ours = (model.decode(found) / 2 + 0.5).clamp(0, 1)
    assert shown.std() > 0.01 and shown.shape == (2, 3, 16, 24)
    torch.testing.assert_close(ours, shown, rtol=0, atol=1e-6)


def test_temperature_and_negative_prompt_are_those_of_the_stock_pipeline(model):
    negative = ["small", "a photo"]
    expected, _ = stock(model, "latent", 3.0, temperature=(20, 1), negative_prompt=negative)
    options = {
        "guidance": classifier_free(3.0),
        "steps": 4,
        "size": tuple(SIZE.values()),
        "uncond": model.embed(negative),
    }
    found = unmask(model, model.embed(PROMPTS), temperature=(20, 1), generator=seeded(), **options)
    assert torch.equal(found, expected)
    assert not torch.equal(unmask(model, model.embed(PROMPTS), generator=seeded(), **options), expected)


def test_rows_with_generators_of_their_own_do_not_depend_on_the_batch(model):
    cond = model.embed(PROMPTS)
    together = unmask(model, cond, guidance=classifier_free(2.0), steps=4, generator=[seeded(1), seeded(2)])
    assert together.shape == (2, 4, 4)
    for row in range(2):
        alone = unmask(model, cond[row], guidance=classifier_free(2.0), steps=4, generator=seeded(1 + row))
        assert torch.equal(together[row : row + 1], alone)
    with pytest.raises(ValueError):
        unmask(model, cond, steps=2, generator=[seeded(1)])


def test_guidance_extrapolates_from_the_unconditional_logits(model):
    cond, tokens = model.embed(PROMPTS), tokens_of(model)
    given, without = model.logits(tokens, cond), model.logits(tokens, model.unconditional(2))
    assert torch.equal(guided_logits(model, tokens, cond, None, classifier_free(1.0)), given)
    torch.testing.assert_close(guided_logits(model, tokens, cond, None, classifier_free(3.0)), 3 * given - 2 * without)


def test_micro_conditioning_is_the_size_of_the_grid_or_what_the_condition_says(model):
    cond, tokens = model.embed(PROMPTS), tokens_of(model)
    own = {"micro_conds": torch.tensor([[24.0, 16, 0, 0, 6], [640, 480, 8, 0, 5]])}
    plain = model.logits(tokens, cond)
    told = model.logits(tokens, Condition(tokens=cond.tokens, pooled=cond.pooled, extra=own))
    torch.testing.assert_close(plain[0], told[0])
    assert (plain[1] - told[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="make the Condition with embed"):
        model.logits(tokens, Condition(tokens=cond.tokens))


def test_a_saved_pipeline_opens_as_the_family(model, tmp_path):
    model.pipe.save_pretrained(tmp_path)
    opened = models.load(str(tmp_path))
    assert (opened.family, opened.source) == ("amused", str(tmp_path))
    assert (opened.resolution, opened.downsample, opened.reader.limit) == (16, 4, 32)
    assert (opened.vocabulary, opened.mask_token) == (16, 17)
    for part in ("vae", "text", "denoiser"):
        assert opened.fingerprint(part) == model.fingerprint(part)
    tokens = tokens_of(model)
    torch.testing.assert_close(opened.logits(tokens, opened.embed(PROMPTS)), model.logits(tokens, model.embed(PROMPTS)))


@pytest.mark.parametrize("part", ["vae", "text", "denoiser"])
def test_fingerprint_tells_weights_apart(model, part):
    before = {name: model.fingerprint(name) for name in ("vae", "text", "denoiser")}
    modules = {"vae": model.vae, "denoiser": model.denoiser, "text": model.pipe.text_encoder}
    with torch.no_grad():
        next(modules[part].parameters()).mul_(1.1)
    assert {name for name in before if model.fingerprint(name) != before[name]} == {part}


def test_a_scheduler_of_another_vocabulary_is_refused():
    pipe = tiny_pipe("amused")
    pipe.scheduler.register_to_config(mask_token_id=15)
    with pytest.raises(UserError, match="vocabularies of its transformer, VQ model and scheduler do not fit"):
        Amused(pipe)
    pipe = tiny_pipe("amused")
    pipe.vqvae = remade(pipe.vqvae, num_vq_embeddings=8)
    with pytest.raises(UserError, match="do not fit"):
        Amused(pipe)


def test_presets_choose_their_kind_of_layer_in_every_component(model):
    for names in (["transformer"], ["text_encoder"], ["transformer", "text_encoder"]):
        modules = {name: model.networks()[name] for name in names}
        presets, counts = model.presets(names), {}
        for preset in ("attention", "attention+ff", "all"):
            adapters = attach(modules, "lora", targets=preset, presets=presets)
            counts[preset] = len(adapters.layers)
            assert {name.split(".")[0] for name in adapters.layers} == set(names)
            adapters.detach()
        every = sum(isinstance(m, nn.Linear | nn.Conv2d) for root in modules.values() for m in root.modules())
        assert 0 < counts["attention"] < counts["attention+ff"] <= counts["all"] == every
    convolutions = attach({"transformer": model.denoiser}, "lora", targets="conv", presets=model.presets())
    assert len(convolutions.layers) == sum(isinstance(m, nn.Conv2d) for m in model.denoiser.modules()) > 4


@pytest.mark.parametrize("method", ["lora", "oft", "boft", "diablo"])
def test_adapters_start_at_the_base_learn_and_switch_off(model, method):
    cond, tokens = model.embed(PROMPTS), tokens_of(model)
    before = model.logits(tokens, cond)
    options = {"block_size": 4} if method == "oft" else {}
    adapters = attach({"transformer": model.denoiser}, method, targets="attention", presets=model.presets(), **options)
    torch.testing.assert_close(model.logits(tokens, cond), before, rtol=0, atol=1e-5)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    after = model.logits(tokens, cond)
    assert (after - before).abs().max() > 1e-3
    after.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters())
    with adapters.disable():
        torch.testing.assert_close(model.logits(tokens, cond), before, rtol=0, atol=1e-5)


def test_low_precision_gives_float32(model):
    cond, tokens = model.embed(PROMPTS), tokens_of(model)
    exact = model.logits(tokens, cond)
    model.pipe.to(torch.bfloat16)
    found = model.logits(tokens, cond)
    assert (found.dtype, model.dtype) == (torch.float32, torch.bfloat16)
    assert (found - exact).norm() / exact.norm() < 0.05
    assert model.decode(tokens_of(model, masked=0.0)).dtype == torch.float32


class TestPictures:
    def test_are_those_of_the_stock_pipeline_whatever_their_batch(self, model):
        options = {"steps": 4, "cfg_scale": 3.0}
        found = images(model, PROMPTS, [3, 4], batch_size=2, **options)
        for row, (prompt, seed) in enumerate(zip(PROMPTS, [3, 4], strict=True)):
            expected = model.pipe(
                prompt,
                num_inference_steps=4,
                guidance_scale=3.0,
                generator=own_generator(Request(prompt=prompt, seed=seed)),
                output_type="np",
            ).images
            assert (found[row] == (expected[0] * 255).round().astype("uint8")).all()
        assert (images(model, PROMPTS[1:], [4], **options)[0] == found[1]).all()
        assert (images(model, PROMPTS[1:], [5], **options)[0] != found[1]).any()

    def test_samplers_of_noise_are_refused(self, model):
        with pytest.raises(UserError, match="sampler 'euler' adds and takes off noise"):
            images(model, PROMPTS, scheduler="euler")


class TestRefusals:
    def test_it_has_nothing_of_continuous_models(self, model):
        for name in ("schedule", "latent_channels", "moments", "encode", "predict", "nothing"):
            assert not hasattr(model, name)
        assert copy.copy(model).source == "tiny-amused"
        assert pickle.loads(pickle.dumps(model)).vocabulary == 16

    @pytest.mark.parametrize("objective", [grpo, denoising, diffusion_dpo])
    def test_objectives_of_continuous_latents_refuse_it_in_one_line(self, model, objective):
        reward = as_reward(lambda images, prompts, meta: images.mean((1, 2, 3)), "toy")
        with pytest.raises(UserError, match=r"'tiny-amused' \(amused\) has none") as caught:
            objective.build(objective.Config()).check(model, reward)
        assert "\n" not in str(caught.value)

    def test_gradient_checkpointing_is_refused(self, model):
        with pytest.raises(UserError, match="the denoiser of this model has no gradient checkpointing"):
            optim.checkpoint_gradients(nn.ModuleDict({"denoiser": model.denoiser}))
