"""OneActor: what is moved by the offset and what is not, what it costs, and how one is fitted."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model

from visiontune.core import Request
from visiontune.diffusion.guidance import guided
from visiontune.errors import UserError
from visiontune.guidance import _words, actor, cfg, oneactor
from visiontune.guidance._network import Network
from visiontune.guidance._projector import Projector
from visiontune.guidance._taps import replaced
from visiontune.guidance.actor import Actor, Fitting
from visiontune.guidance.stack import GuidanceStack

PROMPT = "a red circle above a blue square"
SHORT = Fitting(siblings=2, steps=2, together=2, drawing=2, cfg_scale=3.0, templates=("{}", "a photo of a {}"), lr=1e-2)


@functools.cache
def model(family="sd"):
    made = tiny_model(family)
    made.pipe.scheduler = made.sampler(made.samplers()[0])
    return made


@functools.cache
def character(width=32, word="circle"):
    target, average = torch.randn(2, width, generator=torch.Generator().manual_seed(5))
    return Actor(target=target, average=average, word=word, about={})


def term(**options):
    return oneactor.Config(**{"file": character(), "prompt": PROMPT, "window": (0.0, 1.0), **options})


def conditions(family="sd", rows=1):
    made = model(family)
    return made.embed([PROMPT] * rows), made.embed(["small"] * rows, negative=True)


def at(*terms, family="sd", t=(600,), cond=None):
    made, (own, uncond) = model(family), conditions(family, len(t))
    x = torch.randn(len(t), *made.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return guided(made, x, torch.tensor(t), own if cond is None else cond, uncond, GuidanceStack(terms))


def moved(family, word, offset, rows=1):
    """The condition with an offset at a word."""
    cond, _ = conditions(family, rows)
    tokens = cond.tokens.clone()
    tokens[:, _words.places(model(family), PROMPT, word, "oneactor")] += offset
    return replace(cond, tokens=tokens)


@pytest.mark.parametrize(("family", "width"), [("sd", 32), ("sdxl", 64)])
def test_the_words_embedding_alone_is_moved_for_the_prompt_alone(family, width):
    made, seen = model(family), []

    def make(name, forward):
        @functools.wraps(forward)
        def noted(*args, **kwargs):
            seen.append(kwargs["encoder_hidden_states"])
            return forward(*args, **kwargs)

        return noted

    file = character(width)
    with replaced(Network.of_model(made).reading("oneactor"), make):
        found = at(cfg.Config(scale=3.0), term(file=file, scale=0.5), family=family)
    cond, uncond = conditions(family)
    place = _words.places(made, PROMPT, "circle", "oneactor")
    for one in seen:
        assert torch.equal(one[0], uncond.tokens[0])
        change = one[1] - cond.tokens[0]
        # Of SDXL the slices of both encoders.
        torch.testing.assert_close(change[place], 0.5 * file.target.expand(len(place), -1), rtol=0, atol=1e-6)
        change[place] = 0
        assert not change.any()
    expected = at(cfg.Config(scale=3.0), family=family, cond=moved(family, "circle", 0.5 * file.target))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_siblings_are_guided_away_from_in_a_call_more():
    w, eta, (cond, uncond) = 3.0, 0.7, conditions()
    u = at(cond=uncond)
    target, average = (at(cond=moved("sd", "circle", v)) for v in (0.8 * character().target, character().average))
    found = at(cfg.Config(scale=w), term(exclude=eta))
    torch.testing.assert_close(found, u + w * (target - u) - eta * (average - u), rtol=0, atol=1e-5)
    # With an offset of nothing it is the prompt that is guided away from.
    none = replace(character(), average=torch.zeros(32))
    found = at(cfg.Config(scale=w), term(file=none, exclude=eta))
    torch.testing.assert_close(found, u + w * (target - u) - eta * (at(cond=cond) - u), rtol=0, atol=1e-5)


def test_in_its_window_and_at_no_other_level():
    made = model()
    plan = GuidanceStack([cfg.Config(scale=3.0), term(exclude=1.0, window=(0.5, 1.0))]).plan(made, 4)
    inside = [level >= 0.5 for level in plan.levels]
    assert plan.rows == tuple(3 if one else 2 for one in inside) and True in inside and False in inside
    assert {*GuidanceStack([cfg.Config(scale=3.0), term()]).plan(made, 4).rows} == {2}
    # Rows at other levels than the window's are as they were, those in it as if they were alone.
    stack = (cfg.Config(scale=3.0), term(window=(0.5, 1.0), exclude=0.5))
    both, plain = at(*stack, t=(700, 300)), at(cfg.Config(scale=3.0), t=(700, 300))
    torch.testing.assert_close(both[1], plain[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(both[:1], at(*stack, t=(700,)), rtol=0, atol=1e-5)
    assert (both[0] - plain[0]).abs().max() > 1e-4
    assert torch.equal(at(cfg.Config(scale=3.0), term(scale=0, exclude=1.0)), at(cfg.Config(scale=3.0)))


def test_several_characters_stand_beside_each_other():
    other = replace(character(), target=-character().average, word="square")
    found = at(term(scale=1.0), term(scale=1.0, file=other))
    cond = moved("sd", "circle", character().target)
    tokens = cond.tokens + moved("sd", "square", other.target).tokens - conditions()[0].tokens
    torch.testing.assert_close(found, at(cond=replace(cond, tokens=tokens)), rtol=0, atol=1e-5)


def test_the_pictures_are_those_that_the_model_draws_and_looking_changes_none():
    """And the features are of their last step, for the prompt."""
    made = model()
    seen = actor.look(made, PROMPT, range(4, 6), SHORT)
    guidance = made.guidance(SHORT.cfg_scale)
    drawn = made.draw([Request(prompt=PROMPT, seed=5)], steps=SHORT.drawing, guidance=guidance)
    with torch.no_grad():
        picture = (made.decode(seen.latents[1:]) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(picture, torch.from_numpy(drawn), rtol=0, atol=1e-5)
    middle, found = made.denoiser.mid_block, []
    handle = middle.register_forward_hook(lambda module, args, out: found.append(out))
    made.draw([Request(prompt=PROMPT, seed=5)], steps=SHORT.drawing, guidance=guidance)
    handle.remove()
    torch.testing.assert_close(seen.features[1], found[-1][1], rtol=0, atol=1e-5)
    assert not middle._forward_hooks


def test_fitting_moves_the_projector_alone_and_its_file_is_the_character(tmp_path):
    made, losses = model(), []
    before = [p.clone() for network in made.networks().values() for p in network.parameters()]
    generator = torch.random.get_rng_state()
    found = actor.fit(made, PROMPT, "circle", 3, SHORT, lambda step, loss: losses.append(loss))
    again = actor.fit(made, PROMPT, "circle", 3, SHORT)
    assert torch.equal(found.target, again.target) and torch.equal(torch.random.get_rng_state(), generator)
    after = [p for network in made.networks().values() for p in network.parameters()]
    assert all(torch.equal(one, other) and other.grad is None for one, other in zip(before, after, strict=True))
    assert len(losses) == SHORT.steps and found.target.shape == found.average.shape == (32,)
    assert not torch.equal(found.target, found.average)
    read = Actor.load(found.save(tmp_path / "circle.safetensors"))
    assert torch.equal(read.target, found.target) and torch.equal(read.average, found.average)
    assert (read.word, read.about["prompt"], read.about["seed"], read.about["steps"]) == ("circle", PROMPT, "3", "2")
    assert torch.equal(at(term(file=str(tmp_path / "circle.safetensors"))), at(term(file=found)))


def test_the_loss_is_of_the_picture_its_siblings_and_the_mean_of_their_offsets():
    made, width = model(), 32
    latents = torch.randn(3, *made.latent_shape(), generator=torch.Generator().manual_seed(1))
    features = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(2))
    phi = Projector(8, (4, 4), width)
    cond, place = made.embed([PROMPT]), _words.places(made, PROMPT, "circle", "oneactor")
    seen, calls = actor.Seen(latents, features), []

    class Watched:
        schedule = made.schedule

        def predict(self, x, t, cond):
            calls.append((x, t, cond))
            return made.predict(x, t, cond)

    loss = actor.loss_of(Watched(), phi, seen, cond, place, SHORT, torch.Generator().manual_seed(0))
    (x, t, told) = calls[0]
    with torch.no_grad():
        offsets = phi(features)
        rows = torch.cat(
            [offsets[:1], told.tokens[1:3, place[0]] - cond.tokens[0, place[0]], offsets[1:].mean(0)[None]]
        )
        torch.testing.assert_close(told.tokens[:, place[0]] - cond.tokens[0, place[0]], rows, rtol=0, atol=1e-5)
        assert len({*t.tolist()}) == 4
        # What was mixed in, of latents that are known.
        alpha, sigma = made.schedule.levels(t, 4)
        order = [0, *(1, 2), 0] if torch.allclose(rows[1], offsets[1], atol=1e-5) else [0, 2, 1, 0]
        noise = (x - alpha * latents[order]) / sigma
        torch.testing.assert_close(noise[3], noise[0], rtol=0, atol=1e-3)
        errors = (made.predict(x, t, told) - noise).square().flatten(1).mean(1)
        expected = errors[0] + SHORT.l1 * errors[1:3].mean() + SHORT.l2 * errors[3]
    torch.testing.assert_close(loss.detach(), expected.float(), rtol=1e-3, atol=1e-4)
    loss.backward(inputs=[*phi.parameters()])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in phi.parameters())


def test_the_projector_fits_grids_of_any_size():
    for channels, grid in ((1280, (3, 2)), (32, (5, 4)), (128, (8, 8))):
        with torch.device("meta"):
            found = Projector(channels, grid, 24)(torch.empty(2, channels, *grid))
        assert found.shape == (2, 24)


def test_what_it_cannot_do_is_said(tmp_path):
    def refused(message, **options):
        with pytest.raises(UserError, match=message):
            GuidanceStack([term(**options)]).plan(model(), 2)

    refused("there is no character", file=str(tmp_path / "gone.safetensors"))
    (tmp_path / "text.safetensors").write_text("no tensors")
    refused("is damaged", file=str(tmp_path / "text.safetensors"))
    save_file({"target": torch.zeros(2)}, tmp_path / "other.safetensors", {"word": "circle"})
    refused("is no character: fit one", file=str(tmp_path / "other.safetensors"))
    replace(character(), target=torch.full((32,), torch.nan)).save(tmp_path / "nan.safetensors")
    refused("no two finite vectors of one width", file=str(tmp_path / "nan.safetensors"))
    refused("fitted to embeddings of 7 numbers, and 'tiny-sd' reads such of 32", file=character(7))
    refused("'triangle' does not stand in what is read of the prompt", word="triangle")
    with pytest.raises(UserError, match="set its prompt, or give them to attach"):
        at(term(prompt=None))
    with pytest.raises(UserError, match="attach the stack to a model"), GuidanceStack([term()]).attach(model().pipe):
        model().pipe(PROMPT, num_inference_steps=1, height=16, width=16, guidance_scale=1.0)
    with pytest.raises(UserError, match="is for UNets"):
        actor.look(tiny_model("sd3"), PROMPT, range(1), SHORT)
