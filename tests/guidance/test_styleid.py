"""StyleID: what is kept of the inversions and put into attention, where the run starts, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from torch.nn.functional import scaled_dot_product_attention

from visiontune.core import Request
from visiontune.diffusion.inversion import invert
from visiontune.diffusion.trajectory import Keep, Start, rollout
from visiontune.errors import UserError
from visiontune.guidance import cfg, magicmix, styleid
from visiontune.guidance._features import Kept, pictured, put
from visiontune.guidance._network import Network
from visiontune.guidance.base import Point
from visiontune.guidance.stack import GuidanceStack
from visiontune.ops.pixels import to_tensor

CONTENT = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
STYLE = Image.radial_gradient("L").resize((16, 16)).convert("RGB")
STEPS = 4
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module")
def model():
    made = tiny_model("sd")
    made.pipe.scheduler = made.sampler("ddim")
    return made


def term(**options):
    return styleid.Config(**{"content": CONTENT, "style": STYLE, "layers": "all", **options})


def rolled(made, *terms, rows=1):
    noise = torch.randn(rows, *made.latent_shape(), generator=torch.Generator().manual_seed(3))
    begun = GuidanceStack(terms).begin(made, levels_of(made))
    options = {"chain": STEPS, "start": Start(latents=noise), "keep": Keep(history=True)}
    with torch.no_grad():
        found = rollout(made, made.embed([""] * rows), guidance=begun, **options)
    return found, next(iter(begun.memory.values()), {})


def levels_of(made):
    return (made.chain(STEPS, made.latent_shape())[0] / made.schedule.num_train_timesteps).tolist()


def inverted(made, picture, **options):
    pixels = 2 * to_tensor(np.array(picture))[None] - 1
    x_0 = made.encode(pixels, sample=False)
    return invert(made, x_0, made.embed([""]), chain=STEPS, most_error=None, **options)


def drawn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_noise_gets_the_statistics_of_the_style():
    content, style = drawn(1, 3, 5, 4, seed=1), 2 + 3 * drawn(1, 3, 5, 4, seed=2)
    found = styleid.restyled(content, style)
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(found, (2, 3)), statistic(style, (2, 3)), **EXACT)
        half = statistic(styleid.restyled(content, style, 0.5), (2, 3))
        torch.testing.assert_close(half, (statistic(content, (2, 3)) + statistic(style, (2, 3))) / 2, **EXACT)
    # Places keep their order, and a picture is its own style.
    torch.testing.assert_close(found.flatten(2).argsort(), content.flatten(2).argsort())
    torch.testing.assert_close(styleid.restyled(content, content), content, **EXACT)


@pytest.mark.parametrize("words", [slice(0, 0), slice(0, 2), slice(-2, None)])
def test_tokens_of_the_picture_look_into_the_style(words):
    """The equation, with the words of joint attention where they are and what they are."""
    at = pictured(words, 7)
    own = [drawn(2, 2, 7, 3, seed=seed) for seed in range(3)]
    stored = [drawn(1, 2, at.stop - at.start, 3, seed=10 + seed) for seed in range(3)]
    q, k, v = term(gamma=0.3, temperature=1.7)._injected(tuple(own), tuple(stored), words)
    found = scaled_dot_product_attention(q, k, v)
    mixed = 0.3 * stored[0] + 0.7 * own[0][..., at, :]
    keys, values = put(own[1], stored[1].expand_as(mixed), at), put(own[2], stored[2].expand_as(mixed), at)
    expected = (1.7 * mixed @ keys.mT / 3**0.5).softmax(-1) @ values
    torch.testing.assert_close(found[..., at, :], expected, **EXACT)
    for one, before in zip((q, k, v), own, strict=True):
        assert torch.equal(one[..., words, :], before[..., words, :])
    # Of the content alone, the queries do not depend on where the run is.
    whole, _, _ = term(gamma=1.0, temperature=1.0)._injected(tuple(own), tuple(stored), words)
    assert torch.equal(whole[..., at, :], stored[0].expand_as(mixed))


def test_what_is_kept_is_what_the_layers_were_given_and_keeping_it_changes_nothing(model):
    network = Network.of_model(model)
    layers = network.attention("all", "styleid")
    kept = Kept(term="styleid", network=network, layers=layers, rows=(slice(1), slice(1)))
    watched, plain = inverted(model, CONTENT, guidance=kept), inverted(model, CONTENT)
    assert torch.equal(watched.latents, plain.latents)
    assert [*kept.features] == levels_of(model)[::-1]
    name, layer = next(iter(layers.items()))
    for i, level in enumerate(levels_of(model)):
        assert {*kept.at(level * (1 + 1e-6))} == {*layers}
        seen = []
        handle = layer.to_q.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        model.predict(plain.latents[:, i + 1], plain.timesteps[i : i + 1], model.embed([""]))
        handle.remove()
        heads = seen[0].unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        assert torch.equal(kept.at(level)[name][0], heads)


def test_with_what_the_network_itself_computes_it_is_the_network_itself(model):
    network, x, t = Network.of_model(model), drawn(1, *model.latent_shape(), seed=0).float(), torch.tensor([500])
    kept = Kept(term="styleid", network=network, layers=network.attention("all", "styleid"), rows=(slice(1), slice(1)))
    with torch.no_grad():
        plain = kept(model.predict, x, t, t / 1000, model.embed([""]), None)
        assert torch.equal(plain, model.predict(x, t, model.embed([""])))

        def shaped(**options):
            point = Point(x=x, t=t, levels=[0.5], schedule=model.schedule, memory={"kept": kept})
            with term(**options).shaping(network, {}, point, "prompt") as check:
                found = model.predict(x, t, model.embed([""]))
            check()
            return found

        for gamma in (0.0, 0.3, 0.75, 1.0):
            assert torch.equal(shaped(gamma=gamma, temperature=1.0), plain)
        assert (shaped() - plain).abs().max() > 1e-4


def test_a_run_starts_from_the_contents_noise_and_its_attention_is_the_styles(model):
    both = {name: inverted(model, picture) for name, picture in (("content", CONTENT), ("style", STYLE))}
    (found, memory), (plain, _) = rolled(model, term(), rows=2), rolled(model, rows=2)
    expected = styleid.restyled(both["content"].noise, both["style"].noise)
    torch.testing.assert_close(found.latents[:, 0], expected.repeat(2, 1, 1, 1), rtol=0, atol=1e-5)
    entries = [one for stored in memory["kept"].features.values() for one in stored.values()]
    assert len(entries) == STEPS * len(memory["kept"].layers)
    assert all(one.untyped_storage().nbytes() == one.numel() * one.element_size() for one in sum(entries, ()))
    moved = {
        str(options): rolled(model, term(**options))[0].final
        for options in ({}, {"temperature": 1.0}, {"gamma": 0.3}, {"style": CONTENT}, {"scale": 0.5}, {"adain": 0.0})
    }
    finals = [*moved.values(), plain.final[:1]]
    assert all((one - other).abs().max() > 1e-4 for i, one in enumerate(finals) for other in finals[:i])
    torch.testing.assert_close(rolled(model, term(offload=True))[0].final, moved["{}"], rtol=0, atol=0)


def test_in_a_window_it_begins_where_it_acts(model):
    levels = levels_of(model)
    window = (0.0, (levels[1] + levels[2]) / 2)
    stack = GuidanceStack([cfg.Config(scale=3.0), term(window=window)])
    plan = stack.plan(model, STEPS)
    assert plan.rows == (0, 0, 2, 2) and "4 rows seen before them, once for all pictures" in plan.total()
    found, memory = rolled(model, term(window=window))
    assert len(memory["kept"].features) == 2
    x_0 = [inverted(model, picture).latents[:, -1] for picture in (CONTENT, STYLE)]
    chain = tuple(v[2:] for v in model.chain(STEPS, model.latent_shape()))
    ways = [invert(model, one, model.embed([""]), chain=chain, most_error=None).noise for one in x_0]
    torch.testing.assert_close(found.latents[:, 2], styleid.restyled(*ways), rtol=0, atol=1e-5)


def test_which_layers_are_late():
    unet = [f"{block}.attentions.0.transformer_blocks.0.attn1" for block in ("down_blocks.0", "up_blocks.1")]
    finer = [f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.attn1" for i in (2, 3) for j in range(3)]
    named = dict.fromkeys([*unet, *finer])
    assert [*styleid.late(named)] == finer
    assert [*styleid.late(dict.fromkeys(unet))] == unet[1:]
    blocks = [f"transformer_blocks.{i}.attn" for i in range(5)]
    assert [*styleid.late(dict.fromkeys(blocks))] == blocks[2:]


def test_what_it_cannot_do_is_said(model, tmp_path):
    def refused(message, *terms):
        with pytest.raises(UserError, match=message):
            GuidanceStack(terms).plan(model, STEPS)

    refused(r"styleid: style must be a file, or a picture of Pillow, not 3", term(style=3))
    refused(r"gone\.png", term(content=str(tmp_path / "gone.png")))
    refused("no layer of 'tiny-sd' is called 'up_blocks.7'", term(layers=["up_blocks.7"]))
    refused("styleid and magicmix both say where a run starts", term(), magicmix.Config(picture=CONTENT))
    request = Request(prompt="", seed=0)
    with pytest.raises(UserError, match="styleid: style has 32x16 pixels, which is another ratio"):
        model.draw([request], steps=STEPS, guidance=GuidanceStack([term(style=STYLE.resize((32, 16)))]))
    with pytest.raises(UserError, match="attach the stack to a model"), GuidanceStack([term()]).attach(model.pipe):
        model.pipe("", num_inference_steps=1, height=16, width=16, guidance_scale=1.0)
    begun = GuidanceStack([term()]).begin(model)
    x, t = torch.zeros(1, *model.latent_shape()), torch.tensor([500])
    with pytest.raises(UserError, match="redraws whole pictures from the first step of a run"):
        begun(model.predict, x, t, t / 1000, model.embed([""]), None)
