"""What every family of continuous latents owes: it computes what the stock pipeline of its class computes.

Nothing here knows a family: pipelines, sizes, samplers and roles are what the family says of itself. Models that read
pictures are shown as many as they take in the first row, two at most, and as few in the second.
"""

from __future__ import annotations

import inspect
import itertools
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from resting import Watched, largest, rest
from tiny import tiny_model, tiny_pipe
from torch import nn

from visiontune import models
from visiontune.adapters import attach
from visiontune.core import Condition, Request
from visiontune.diffusion.dynamics import DDIM
from visiontune.diffusion.guidance import classifier_free, guided
from visiontune.diffusion.schedule import shifted
from visiontune.diffusion.trajectory import Start, Window, rollout
from visiontune.errors import UserError
from visiontune.models import families
from visiontune.models.diffusion import DiffusionModel
from visiontune.models.pipeline import PipelineModel, own_generator
from visiontune.models.words import rows_of
from visiontune.objectives import alignprop, denoising
from visiontune.ops.memory import held
from visiontune.rewards import brightness

PROMPTS = ["a red circle above a blue square", "green triangle"]
STEPS = 3
CASES = [
    (family, options)
    for family, cls in sorted(families().items())
    if issubclass(cls, DiffusionModel)
    for options in tiny.variants(family)
]


def with_eta(family: str) -> bool:
    """Whether the stock pipelines of a family take an amount of noise."""
    return all(
        "eta" in inspect.signature(getattr(diffusers, name).__call__).parameters
        for name in families()[family].pipeline_classes
    )


def name_of(case):
    family, options = case
    return "-".join([family, *(f"{key}={value}" for key, value in options.items())])


@pytest.fixture(params=CASES, ids=name_of)
def model(request):
    """The family on its tiny pipeline, which draws by the sampler that rollouts step by."""
    family, options = request.param
    made = tiny_model(family, **options)
    made.pipe.scheduler = made.sampler(made.samplers()[0])
    return made


def fresh(request):
    """The same with its own sampler and untouched weights."""
    family, options = request.node.callspec.params["model"]
    return tiny_model(family, **options)


def sizes(model):
    """Two sizes that are not square, so that swapped sides would show."""
    short, long = model.resolution, model.resolution + model.unit
    return [(short, long), (long, short)]


def picture(number):
    """A picture with sides that differ, and of two of them in another order."""
    height, width = [(29, 20), (18, 24)][number]
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(model, prompts=PROMPTS, negatives=("", "")):
    """A request for each prompt, with pictures where the model reads any."""
    reads, made = model.reads, []
    for row, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        count = reads.least if row else min(2, 2 if reads.most is None else reads.most)
        shown = tuple(picture(row + number) for number in range(count))
        mask = Image.fromarray(np.uint8(255 * (np.indices((80, 80))[row] > 30))) if reads.mask else None
        made.append(Request(prompt=prompt, negative=negative, seed=row, pictures=shown, mask=mask))
    return made


def generators(rows=(0, 1)):
    """Of pictures that stock pipelines draw a posterior of."""
    return [torch.Generator().manual_seed(50 + row) for row in rows]


def read(model, prompts=PROMPTS, size=None, **options):
    """What rows are conditioned on."""
    return model.read(asked(model, prompts), size=size or sizes(model)[0], generator=generators(), **options)


def without_words(model, size=None):
    """What rows are guided away from, where the stock pipeline is told no negative prompt."""
    return read(model, size=size, negative=True) if model.reads.pictures else model.unconditional(2)


def noise(model, size=None, seed=0):
    shape = (len(PROMPTS), *model.latent_shape(*(size or sizes(model)[0])))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def somewhere(model):
    """[2] timesteps that differ: not far from clean, and not far from noise."""
    start, _ = model.chain(10, model.latent_shape())
    return start[[8, 1]]


@contextmanager
def calls(model):
    """What the first denoiser gives in the block, call by call."""
    found = []

    def note(module, args, out):
        found.append(torch.stack(out[0]) if isinstance(out[0], list) else out[0].clone())

    hook = model.denoiser.register_forward_hook(note)
    yield found
    hook.remove()


def apart(model):
    """The rows of each call of its pipeline, which takes pictures of one size in a batch."""
    return ((0,), (1,)) if model.reads.pictures else ((0, 1),)


def stock(model, size, guidance, negatives=("", ""), **options):
    """Pictures [b, 3, H, W] of the stock pipeline, drawn from `noise`, and what its denoiser gave at first.

    What is shown pictures is drawn alone, since pipelines take pictures of one size in a batch.
    """
    requests, shown, first = asked(model, negatives=negatives), [], []
    for rows in apart(model):
        group = [requests[row] for row in rows]
        given = {"latents": model._stock_latents(noise(model, size)[list(rows)]), "generator": generators(rows)}
        given |= model._stock_reading(group, size) | model._stock(guidance, group) | options
        with calls(model) as found:
            drawn = model.pipe(
                prompt=[one.prompt for one in group],
                num_inference_steps=STEPS,
                height=size[0],
                width=size[1],
                output_type="pt",
                **given,
            )
        shown.append(drawn.images)
        first += found[: len(found) // STEPS]
    return torch.cat(shown), first


def pictures(model, latents):
    return (model.decode(latents) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_predict_is_the_first_call_of_the_stock_pipeline(model, scale):
    """Row by row, since pipelines differ in whether they guide in one call or two, and in which order."""
    size, guidance = sizes(model)[0], model.guidance(scale)
    _, expected = stock(model, size, guidance)
    start, _ = model.chain(STEPS, noise(model).shape[1:])
    with calls(model) as found:
        pred = guided(model, noise(model), start[:1].expand(2), read(model), without_words(model), guidance)
    assert pred.shape == noise(model).shape and pred.std() > 0.01
    ours, theirs = ([row.flatten() for call in made for row in call] for made in (found, expected))

    def distance(one, other):
        return float((one - other).abs().max()) if one.shape == other.shape else torch.inf

    for some, others in ((ours, theirs), (theirs, ours)):
        assert all(min(distance(row, other) for other in others) < 1e-5 for row in some)
    assert all(distance(one, other) > 1e-3 for one, other in itertools.combinations(ours, 2))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("turned", [False, True])
def test_rollout_and_decode_give_the_pictures_of_the_stock_pipeline(model, scale, turned):
    size, guidance = sizes(model)[turned], model.guidance(scale)
    expected, _ = stock(model, size, guidance)
    told = {"uncond": without_words(model, size)} if model.reads.pictures else {}
    start = Start(latents=noise(model, size))
    final = rollout(model, read(model, size=size), guidance=guidance, chain=STEPS, start=start, **told).final
    ours = pictures(model, final)
    assert ours.shape == (2, 3, *size) and ours.std() > 0.01
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_negative_prompt_is_what_the_stock_pipeline_guides_away_from(model):
    negatives, size, guidance = ["small", "a photo"], sizes(model)[0], model.guidance(3.0)
    if not guidance.contrasts:
        pytest.skip("its guidance is inside the network and guides away from nothing")
    expected, _ = stock(model, size, guidance, negatives)
    final = rollout(
        model,
        read(model),
        uncond=model.read(asked(model, negatives=negatives), negative=True, size=size, generator=generators()),
        guidance=guidance,
        chain=STEPS,
        start=Start(latents=noise(model, size)),
    ).final
    torch.testing.assert_close(pictures(model, final), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [case for case in CASES if with_eta(case[0])], ids=name_of, indirect=True)
def test_noise_is_added_as_the_stock_pipeline_adds_it(model):
    if "eta" not in inspect.signature(model.pipe.scheduler.step).parameters:
        pytest.skip("its pipeline takes eta, and its samplers make nothing of it")
    size, guidance = sizes(model)[0], model.guidance(3.0)
    rng = torch.Generator().manual_seed(5)
    expected, _ = stock(model, size, guidance, latents=None, generator=rng, eta=0.7)
    rng, ours = torch.Generator().manual_seed(5), []
    for rows in apart(model):
        latents = torch.randn(len(rows), *model.latent_shape(*size), generator=rng)
        cond = model.read([asked(model)[row] for row in rows], size=size, generator=rng)
        start, adding = Start(latents=latents, generator=rng), DDIM(eta=0.7)
        final = rollout(model, cond, guidance=guidance, chain=STEPS, dynamics=adding, start=start).final
        ours.append(pictures(model, final))
    torch.testing.assert_close(torch.cat(ours), expected, rtol=0, atol=1e-5)


def test_each_row_is_predicted_as_if_it_were_alone(model):
    cond, x_t, t = read(model), noise(model), somewhere(model)
    together = model.predict(x_t, t, cond)
    for row in range(2):
        alone = model.predict(x_t[row : row + 1], t[row : row + 1], cond[row])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
        one = model.predict(x_t[row : row + 1], t[row], cond[row])
        assert torch.equal(one, alone)


def test_a_prompt_reads_the_same_beside_a_longer_one(model):
    prompts = ["a", "a small green triangle left of the large red circle, in the photo of a blue square"]
    x_t, t = noise(model), somewhere(model)
    together = model.predict(x_t, t, read(model, prompts))
    parts = [read(model, [prompt] * 2)[row] for row, prompt in enumerate(prompts)]
    joined = model.predict(x_t, t, Condition.cat(parts))
    torch.testing.assert_close(joined, together, rtol=0, atol=1e-5)
    for row, part in enumerate(parts):
        alone = model.predict(x_t[row : row + 1], t[row : row + 1], part)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(model.predict(x_t, t, read(model, prompts[::-1])), together, atol=1e-3)


def test_the_rows_of_a_word_are_those_that_prompts_with_it_read(model):
    prompts = ["a green circle", "a red circle"]
    before = read(model, prompts)
    with torch.no_grad():
        for layer, words, kept in rows_of(model, "green", "circle").values():
            assert kept and kept.isdisjoint(words["green"])
            layer.weight[words["green"]] *= -2
    moved = (read(model, prompts).tokens - before.tokens).flatten(1).abs().amax(1)
    assert moved[0] > 1e-3 and moved[1] == 0


def test_guidance_extrapolates_from_the_unconditional_prediction(model):
    cond, x_t, t = read(model), noise(model), somewhere(model)
    away = without_words(model)
    given = model.predict(x_t, t, cond)
    without = model.predict(x_t, t, away)
    assert torch.equal(guided(model, x_t, t, cond, away, classifier_free(1.0)), given)
    torch.testing.assert_close(
        guided(model, x_t, t, cond, away, classifier_free(2.0)), 2 * given - without, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(guided(model, x_t, t, cond, away, classifier_free(0.0)), without, rtol=0, atol=1e-5)


def test_unconditional_rows_can_take_the_place_of_rows(model):
    """Caption dropout and guidance join both kinds of condition in one batch."""
    cond, away = read(model), without_words(model)
    joined = Condition.cat([cond, away, away])
    assert len(joined) == 6
    torch.testing.assert_close(joined.tokens[2:4], joined.tokens[4:])


def test_latents_are_those_of_the_vae(model):
    height, width = sizes(model)[0]
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    # To a VAE of clips a picture is one frame.
    clips = any(isinstance(module, nn.Conv3d) for module in model.vae.modules())
    flat = (lambda z: z.squeeze(2)) if clips else (lambda z: z)
    encoded = model.vae.encode(pixels.unsqueeze(2) if clips else pixels)
    if "latent_dist" in encoded:
        posterior = encoded.latent_dist
    else:  # an autoencoder that is sure of its latents
        certain = torch.cat([encoded.latent, torch.zeros_like(encoded.latent)], dim=1)
        posterior = DiagonalGaussianDistribution(certain, deterministic=True)
    mode = model.to_latents(flat(posterior.mode()))
    torch.testing.assert_close(model.encode(pixels, sample=False), mode)
    expected = model.to_latents(flat(posterior.sample(torch.Generator().manual_seed(3))))
    torch.testing.assert_close(model.encode(pixels, generator=torch.Generator().manual_seed(3)), expected)

    moments = model.moments(pixels)
    mean, std = moments.chunk(2, dim=1)
    torch.testing.assert_close((mean, std), (flat(posterior.mean), flat(posterior.std)))
    torch.testing.assert_close(model.latents_from_moments(moments), mode)
    eps = torch.randn_like(mean)
    torch.testing.assert_close(model.latents_from_moments(moments, eps), model.to_latents(mean + std * eps))

    torch.testing.assert_close(model.from_latents(mode), flat(posterior.mode()))
    expected = flat(model.vae.decode(posterior.mode()).sample)
    torch.testing.assert_close(model.decode(mode), expected, rtol=1e-4, atol=1e-5)
    assert mode.shape == (2, *model.latent_shape(height, width))


def test_gradients_reach_latents_prompts_and_start(model):
    assert not any(p.requires_grad for m in model.networks().values() for p in m.parameters())
    assert not read(model).tokens.requires_grad

    latents = noise(model).requires_grad_()
    model.decode(latents).square().mean().backward()
    assert latents.grad.abs().sum() > 0

    for name, encoder in model.of("text").items():
        encoder.requires_grad_(True)
        x_t = noise(model).requires_grad_()
        model.predict(x_t, somewhere(model), read(model)).square().mean().backward()
        assert x_t.grad.abs().sum() > 0
        words = encoder.get_input_embeddings().weight  # which all else comes after
        assert words.grad is not None and words.grad.abs().sum() > 0, name
        encoder.requires_grad_(False)


def test_gradient_checkpointing_changes_nothing(model):
    def gradients():
        cond, x_t = read(model), noise(model).requires_grad_()
        model.predict(x_t, somewhere(model), cond).square().mean().backward()
        return x_t.grad, {name: p.grad.clone() for name, p in model.denoiser.named_parameters() if p.grad is not None}

    model.denoiser.requires_grad_(True)
    plain = gradients()
    model.denoiser.zero_grad()
    model.denoiser.enable_gradient_checkpointing()
    model.denoiser.train()
    torch.testing.assert_close(gradients(), plain)
    assert len(plain[1]) > 0.9 * len(list(model.denoiser.parameters()))


def test_blocks_that_rest_come_one_by_one_and_change_no_bit(model):
    def predicted():
        cond, x_t = read(model), noise(model).requires_grad_()
        loss = model.predict(x_t, somewhere(model), cond).square().mean()
        return loss.detach(), *torch.autograd.grad(loss, x_t)

    model.denoiser.enable_gradient_checkpointing()
    model.denoiser.train()
    expected, device = predicted(), model.device
    resting = rest(model)
    with Watched(resting) as watched:
        assert all(map(torch.equal, predicted(), expected))
    assert not watched.read and watched.now == 0
    # What a network does not recompute stays for the backward pass, as the refiners of Lumina do.
    assert largest(resting) <= watched.most < held(resting.tensors())
    # The denoiser is where what it computes with is, for all who ask where its first weight is.
    model.to("meta", *model.names())
    assert model.device.type == "meta" != device.type
    assert {tensor.device for tensor in resting.tensors()} == {device}


def test_rollout_differentiates_its_last_steps(model):
    cond = read(model)
    tokens = cond.tokens.clone().requires_grad_()
    cond = replace(cond, tokens=tokens)
    assert not rollout(model, cond, chain=3, start=Start(latents=noise(model))).final.requires_grad
    grads = []
    for grad_steps in (1, 3):
        final = rollout(model, cond, chain=3, start=Start(latents=noise(model)), window=Window(steps=grad_steps)).final
        grads.append(torch.autograd.grad(final.square().mean(), tokens)[0])
    assert grads[0].abs().sum() > 0
    assert not torch.allclose(grads[0], grads[1])


def adaptable(networks, kind=nn.Linear | nn.Conv2d):
    """The layers of a kind, but for convolutions in groups, of which other tools read other factors."""
    found = [m for network in networks for m in network.modules() if isinstance(m, kind)]
    return [m for m in found if getattr(m, "groups", 1) == 1]


def test_presets_choose_their_kind_of_layer_in_every_network(model):
    denoisers, text = list(model.of("denoiser")), list(model.of("text"))
    for names in (*([name] for name in [*denoisers, *text]), text, [*denoisers, *text]):
        modules = {name: model.networks()[name] for name in names}
        presets = model.presets(names)
        assert set(presets) == {"attention", "attention+ff", "conv", "all"}
        counts = {}
        for preset in ("attention", "attention+ff", "all"):
            adapters = attach(modules, "lora", targets=preset, presets=presets)
            counts[preset] = len(adapters.layers)
            assert {layer.split(".")[0] for layer in adapters.layers} == set(names)
            adapters.detach()
        every = len(adaptable(modules.values()))
        assert 0 < counts["attention"] < counts["attention+ff"] <= counts["all"] <= every
        # Text encoders may have heads and towers that no prompt passes through.
        idle = sum(layer.partition(".")[0] in names for layer in model.idle())
        assert counts["all"] == every - idle or not {*names} <= {*denoisers}
    assert model.names() == tuple(denoisers)
    found = adaptable(model.of("denoiser").values(), nn.Conv2d)
    if found:
        convolutions = attach(model.of("denoiser"), "lora", targets="conv", presets=model.presets())
        assert len(convolutions.layers) == len(found)
        convolutions.detach()
    assert bool(model.presets()["conv"]) == bool(found) and not model.presets(text)["conv"]


def test_what_presets_leave_out_is_what_takes_no_part_in_a_prediction(model):
    layers = {
        f"{name}.{inner}": layer
        for name, network in model.of("denoiser").items()
        for inner, layer in network.requires_grad_(True).named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    model.predict(noise(model), somewhere(model), read(model)).square().mean().backward()
    unread = {name for name, layer in layers.items() if layer.weight.grad is None or not layer.weight.grad.any()}
    assert {*model.idle()} == unread


def test_fingerprint_tells_weights_apart(model, request):
    parts, other = ("vae", "text", "denoiser"), fresh(request)
    for part in parts:
        for name, network in model.of(part).items():
            assert other.fingerprint(name) == model.fingerprint(name)
            before = {part: model.fingerprint(part) for part in parts}
            with torch.no_grad():
                next(p for p in network.parameters() if p.any()).mul_(1.1)
            assert {part for part in parts if model.fingerprint(part) != before[part]} == {part}


def test_low_precision_model_takes_and_gives_float32(model):
    cond, x_t, t = read(model), noise(model), somewhere(model)
    exact = model.predict(x_t, t, cond)
    base = model.fingerprint("denoiser")
    half = model.at(torch.bfloat16).predict(x_t, t, cond)
    model.pipe.to(torch.bfloat16)
    pred = model.predict(x_t, t, cond)
    assert (pred.dtype, half.dtype, model.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    for found in (pred, half):
        assert 0 < (found - exact).norm() / exact.norm() < 0.05
    assert model.fingerprint("denoiser") == base
    assert model.decode(x_t).dtype == model.encode(torch.zeros(1, 3, *sizes(model)[0])).dtype == torch.float32
    cond = read(model)
    assert model.predict(x_t, t, cond).isfinite().all()


def test_the_time_that_the_network_is_told_is_not_rounded_to_its_type(model):
    """In bfloat16 999 and 1000 are one number, as shares too, and so are what a half and one thousandth leave of 1."""
    pairs = [(998, 999)] if model.schedule.prediction != "flow" else [(999.0, 1000.0), (0.5, 1.0)]
    cond = Condition.cat([read(model)[0]] * 2)
    x_t = noise(model)[:1].repeat(2, *[1] * (noise(model).ndim - 1))
    half = model.at(torch.bfloat16)
    with torch.no_grad():
        found = [half.predict(x_t, torch.tensor(pair), cond) for pair in pairs]
        model.pipe.to(torch.bfloat16)
        found += [model.predict(x_t, torch.tensor(pair), cond) for pair in pairs]
    for one, other in found:
        assert not torch.equal(one, other)


def test_training_is_shifted_as_sampling_is(model):
    """What the shift is undone of is spread as the pipeline places steps before it, evenly for most."""
    steps = 112  # so many that the whole timesteps of a table stand evenly
    if model.schedule.prediction == "flow":
        model.schedule.spacing.register_to_config(shift_terminal=None)
        steps = 200
    for size in (*sizes(model), (4 * model.resolution, 4 * model.resolution)):
        shape = model.latent_shape(*size)
        start, _ = model.chain(steps, shape)
        k = model.sampling_shift(shape)
        places = shifted(start.double() / model.schedule.num_train_timesteps, 1 / k)
        if model.LOGIT_STD:
            places = torch.special.ndtr(places.logit() / model.LOGIT_STD)
        apart = places.diff()
        torch.testing.assert_close(apart, apart.mean().expand_as(apart), rtol=2e-3, atol=1e-6)


def wanted(model):
    """Three requests, of which the second guides away from something."""
    first, second = asked(model, negatives=("", "small"))
    return [replace(first, seed=3), replace(second, seed=4), replace(second, prompt=PROMPTS[0], negative="", seed=5)]


class TestDraw:
    def test_draws_what_the_stock_pipeline_draws_from_the_seeds_noise(self, model):
        size, guidance, one = sizes(model)[1], model.guidance(3.0), wanted(model)[:1]
        found = model.draw(one, steps=STEPS, guidance=guidance, size=size)
        rng = own_generator(one[0])
        latents = torch.randn(model.latent_shape(*size), generator=rng)[None]
        after = rng.get_state()
        assert found.shape == (1, *size, 3) and found.std() > 0.01
        theirs = model.pipe(
            prompt=PROMPTS[:1],
            latents=model._stock_latents(latents),
            generator=rng,
            num_inference_steps=STEPS,
            height=size[0],
            width=size[1],
            output_type="np",
            **model._stock_reading(one, size),
            **model._stock(guidance, one),
        ).images
        np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-6)

        def told(**options):
            return model.read(one, size=size, generator=rng.set_state(after), **options)

        cond, start = told(), Start(latents=latents)
        away = {"uncond": told(negative=True)} if model.reads.pictures else {}
        final = rollout(model, cond, guidance=guidance, chain=STEPS, start=start, **away).final
        ours = pictures(model, final).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(found, ours, rtol=0, atol=1e-5)

    def test_a_picture_does_not_depend_on_what_else_is_drawn(self, model):
        options, requests = {"steps": STEPS, "guidance": model.guidance(3.0)}, wanted(model)
        plain = replace(requests[1], negative="")
        one, plain, other = (model.draw([r], **options)[0] for r in (requests[0], plain, requests[2]))
        assert abs(one - other).max() > 0.01
        together = model.draw(requests[::2], **options)
        np.testing.assert_allclose(together, np.stack([one, other]), rtol=0, atol=1e-5)
        if options["guidance"].contrasts:
            two = model.draw(requests[1:2], **options)[0]
            assert abs(two - plain).max() > 1e-4
        else:
            with pytest.raises(UserError, match="leave the negative prompt out"):
                model.draw(requests[1:2], **options)

    @pytest.mark.parametrize("model", [case for case in CASES if "edits" not in case[1]], ids=name_of, indirect=True)
    def test_every_sampler_comes_to_what_the_familys_own_comes_to(self, model, request):
        model = fresh(request)
        options, requests = {"steps": 25, "guidance": model.guidance(1.0)}, [Request(prompt=PROMPTS[0], seed=3)]
        # All but lcm, which goes to a clean picture in each step and noises it again.
        along = [name for name in model.samplers() if name != "lcm"]
        found = {name: model.draw(requests, sampler=name, **options) for name in along}
        for name, shown in found.items():
            assert abs(shown - found["model"]).mean() < 0.05 * found["model"].std(), name
        with pytest.raises(UserError, match="sampler 'nothing' does not fit"):
            model.draw(requests, sampler="nothing", **options)

    def test_sides_that_do_not_fit_are_refused(self, model):
        with pytest.raises(UserError, match=f"must be multiples of {model.unit}"):
            model.size(model.resolution, model.resolution + model.unit // 2)
        assert model.size() == (model.resolution, model.resolution)


def test_what_was_distilled_to_few_steps_is_refused_by_a_plain_denoising_loss_alone(model):
    alone, all_the_same = (denoising.Denoising(denoising.Config(distilled=told)) for told in (False, True))
    if model.distilled is None:
        alone.check(model, None)
    else:
        with pytest.raises(UserError, match=r"was distilled to few steps .* or set objective\.distilled=true"):
            alone.check(model, None)
    all_the_same.check(model, None)
    alignprop.build(alignprop.Config()).check(model, brightness.build(brightness.Config()))


def test_every_family_of_a_pipeline_has_a_tiny_one_and_a_row_of_the_table():
    expected = {name: cls for name, cls in families().items() if issubclass(cls, PipelineModel)}
    assert {path.stem for path in (Path(tiny.__file__).parent / "families").glob("*.py")} == set(expected)
    documented = (Path(tiny.__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    for name, cls in expected.items():
        assert type(tiny_pipe(name)).__name__ in cls.pipeline_classes
        assert f"\n| `{name}` |" in documented and all(f"`{kind}`" in documented for kind in cls.pipeline_classes)


def test_a_saved_model_opens_as_it_was(model, request, tmp_path):
    model = fresh(request)
    model.save(tmp_path / "saved")
    opened = models.load(str(tmp_path / "saved"))
    assert type(opened) is type(model) and list(opened.networks()) == list(model.networks())
    for name, network in model.networks().items():
        assert opened.fingerprint(name) == model.fingerprint(name)
        weights = opened.networks()[name].state_dict()
        assert all(torch.equal(weights[key], value) for key, value in network.state_dict().items())
    assert opened.latent_shape() == model.latent_shape() and opened.unit == model.unit
    options = {"steps": STEPS, "guidance": model.guidance(3.0)}
    requests = wanted(model)[::2]
    # Some processors round by where weights lie, and those that are read from a file lie elsewhere.
    np.testing.assert_allclose(opened.draw(requests, **options), model.draw(requests, **options), rtol=0, atol=1e-5)
    assert not any(p.requires_grad for network in opened.networks().values() for p in network.parameters())
