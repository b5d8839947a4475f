"""Inheritance of features: when everything is computed, what is taken from when, and what a run leaves behind."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny import tiny_model

from visiontune.core import Request
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.errors import UserError
from visiontune.guidance import cfg, inherit, pag, skip_tuning, slg
from visiontune.guidance._network import Network
from visiontune.guidance._taps import replaced
from visiontune.guidance.base import Canvas, Part, Point, Run
from visiontune.guidance.stack import GuidanceStack
from visiontune.models.pipeline import own_generator

PROMPTS = ["a red circle above a blue square", "green triangle"]
REQUESTS = [Request(prompt=prompt, negative="small", seed=seed) for seed, prompt in enumerate(PROMPTS)]
LEVELS = [1.0, 0.8, 0.6, 0.4, 0.2]


@functools.cache
def model():
    made = tiny_model("sd")
    made.pipe.scheduler = made.sampler("ddim")
    return made


def stack_of(*terms):
    return GuidanceStack([cfg.Config(scale=3.0), *terms])


def drawn(stack, requests=REQUESTS, steps=4):
    return model().draw(requests, steps=steps, guidance=stack)


def point(level, run=LEVELS, memory=None):
    x = torch.zeros(1, *model().latent_shape())
    memory = {} if memory is None else memory
    return Point(x=x, t=x.new_tensor([level * 1000]), levels=[level], schedule=None, run=Run(levels=run), memory=memory)


def counted(stack, *names):
    """How often modules are computed in five steps."""
    calls = dict.fromkeys(names, 0)

    def make(name, forward):
        def noted(*args, **kwargs):
            calls[name] += 1
            return forward(*args, **kwargs)

        return functools.wraps(forward)(noted)

    with replaced({name: model().denoiser.get_submodule(name) for name in names}, make), torch.no_grad():
        start = Start(latents=torch.zeros(1, *model().latent_shape()))
        rollout(model(), model().embed(PROMPTS[1:]), guidance=stack, chain=5, start=start)
    return calls


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"first": 0}, [0, 2, 4, 6, 8]),
        ({"scale": 3, "first": 0}, [0, 3, 6, 9]),
        ({"first": 0.25}, [0, 1, 2, 4, 6, 8]),
        ({"scale": 3, "first": 0.2}, [0, 1, 4, 7]),
        ({"scale": 100, "first": 0}, [0]),
        ({"first": 0.2, "window": (0.05, 0.55)}, [5, 7, 9]),
        ({"first": 0.2, "window": (0.5, 1.0)}, [0, 1, 3, 5]),
    ],
)
def test_everything_is_computed_once_a_period(options, keys):
    """From the end of the first steps, or the beginning of the window, on."""
    assert inherit.Config(**options).keys([1 - i / 10 for i in range(10)]) == keys


MODULES = (
    "down_blocks.0",
    "down_blocks.0.resnets.0",
    "down_blocks.0.downsamplers.0",
    "down_blocks.1",
    "mid_block",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.0",
    "up_blocks.1.resnets.0",
    "up_blocks.1.resnets.1",
)


@pytest.mark.parametrize(
    ("layers", "inherited"),
    [
        ("inner", {2, 3, 4, 5, 6, 7}),
        ("deep", {3, 4, 5, 6}),
        ("mid", {4, 5}),
        (["*.attn2"], {5}),
        (["mid_block", "mid_block.attentions.0", "up_blocks.1.resnets.1"], {4, 5, 8}),
    ],
)
def test_what_is_inherited_is_not_computed(layers, inherited):
    """Three of five steps are computed in full."""
    found = counted(GuidanceStack([inherit.Config(first=0, layers=layers)]), *MODULES)
    assert found == {name: 3 if i in inherited else 5 for i, name in enumerate(MODULES)}


@torch.no_grad()
def test_a_step_is_made_of_its_own_outer_stages_and_earlier_inner_ones():
    """Computed piece by piece."""
    made, memory, term = model().denoiser, {}, inherit.Config(first=0, layers="deep")
    network = Network.of_model(model())
    words = model().embed(PROMPTS).tokens
    x = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    def at(x, t, level):
        with term.shaping(network, {}, point(level, memory=memory), "prompt"):
            return made(x, t, encoder_hidden_states=words).sample

    deep = []
    handle = made.up_blocks[0].register_forward_hook(lambda module, args, found: deep.append(found))
    first = at(x[0], 900, 1.0)
    handle.remove()
    assert torch.equal(first, made(x[0], 900, encoder_hidden_states=words).sample)
    time = made.time_embedding(made.get_time_embed(x[1], torch.tensor([700, 700])))
    given = made.conv_in(x[1])
    _, skips = made.down_blocks[0](given, time, encoder_hidden_states=words)
    last = made.up_blocks[1](deep[0], (given, skips[0]), time, encoder_hidden_states=words)
    expected = made.conv_out(made.conv_act(made.conv_norm_out(last)))
    assert torch.equal(at(x[1], 700, 0.8), expected)
    # What it took at one level, it takes at that level again; at the next it computes everything.
    assert torch.equal(at(x[1], 700, 0.8), expected)
    assert torch.equal(at(x[1], 700, 0.6), made(x[1], 700, encoder_hidden_states=words).sample)
    # Calls of a term's own inherit nothing.
    for level, other in ((1.0, x[1]), (0.8, x[0])):
        with term.shaping(network, {}, point(level, memory=memory), "at"):
            found = made(other, 700, encoder_hidden_states=words).sample
        assert torch.equal(found, made(other, 700, encoder_hidden_states=words).sample)
    assert not any("forward" in vars(module) for module in made.modules())


@torch.no_grad()
def test_a_side_inherits_of_the_latest_full_step_or_is_computed():
    """Where it was not called then, it is computed where it is called first."""
    network, term, memory = Network.of_model(model()), inherit.Config(first=0), {}
    words, x = model().embed(PROMPTS).tokens, torch.zeros(2, 4, 8, 8)
    called = [
        *((1.0, "both", 1), (1.0, "pag", 1)),
        *((0.8, "both", 0), (0.8, "pag", 0), (0.8, "pag 2", 1)),
        (0.6, "both", 1),
        *((0.4, "both", 0), (0.4, "pag", 1), (0.4, "pag 2", 1)),
    ]
    for level, side, seen in called:
        calls = []
        layer = model().denoiser.mid_block.resnets[0]
        handle = layer.register_forward_hook(lambda module, args, found, calls=calls: calls.append(1))
        with term.shaping(network, {}, point(level, memory=memory), side):
            model().denoiser(x, level * 1000, encoder_hidden_states=words)
        handle.remove()
        assert len(calls) == seen


def test_runs_do_not_inherit_from_one_another():
    """Nor sides: what guides by a perturbed network is the same in rollouts, where calls are others' calls."""
    term = inherit.Config(first=0, scale=3)
    stack = stack_of(
        term, pag.Config(), pag.Config(layers="all", window=(0.0, 0.7)), slg.Config(), skip_tuning.Config()
    )
    pictures = drawn(stack)
    alone = drawn(stack, REQUESTS[1:])
    np.testing.assert_array_equal(drawn(stack), pictures)
    np.testing.assert_allclose(alone, pictures[1:], rtol=0, atol=1e-5)
    noise = torch.stack([torch.randn(model().latent_shape(), generator=own_generator(one)) for one in REQUESTS])
    cond, uncond = model().embed(PROMPTS), model().embed(["small"] * 2, negative=True)
    with torch.no_grad():
        found = rollout(model(), cond, uncond=uncond, guidance=stack, chain=4, start=Start(latents=noise)).final
        ours = (model().decode(found) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, pictures, rtol=0, atol=1e-5)


@torch.no_grad()
def test_two_perturbations_of_a_kind_inherit_each_from_itself():
    """So that each adds at a step what it adds there alone."""
    cond, x = model().embed(PROMPTS[1:]), torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def second(*terms):
        run = GuidanceStack([inherit.Config(first=0), *terms]).begin(model(), LEVELS)
        for latents, level in zip(x, LEVELS, strict=False):
            levels = torch.tensor([level])
            found = run(model().predict, latents, levels * 1000, levels, cond, None)
        return found

    one, other = pag.Config(), pag.Config(layers="all")
    torch.testing.assert_close(second(one, other), second(one) + second(other) - second(), rtol=0, atol=1e-5)
    assert (second(one) - second(other)).abs().max() > 1e-3


@dataclass(frozen=True, kw_only=True)
class Halves(Canvas):
    """The left and the right half, each with a prompt of its own, which nothing blends."""

    scale: float = 1.0
    texts: tuple[str, ...] = ("a red circle", "a blue square")

    def scales(self, run):
        return [None, None]

    def parts(self, sides, point):
        uncond = model().embed(["small"], negative=True)
        halves = zip(point.x.chunk(2, dim=-1), self.texts, strict=True)
        return [Part(x=x, cond=model().embed([text]), uncond=uncond) for x, text in halves]

    def blend(self, predictions, point):
        return torch.cat(list(predictions), dim=-1)


@torch.no_grad()
def test_regions_inherit_from_themselves():
    """Halves are two runs of their own."""
    texts, made = Halves().texts, model()
    x = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    stack = stack_of(inherit.Config(first=0, scale=3))
    uncond = made.embed(["small"], negative=True)

    def rolled(x, text, stack):
        start = Start(latents=x)
        return rollout(made, made.embed([text]), uncond=uncond, guidance=stack, chain=4, start=start).final

    halves = [rolled(half, text, stack) for half, text in zip(x.chunk(2, dim=-1), texts, strict=True)]
    whole = rolled(x, "green triangle", GuidanceStack([*stack.terms, Halves()]))
    torch.testing.assert_close(whole, torch.cat(halves, dim=-1), rtol=0, atol=1e-5)


def test_a_plan_says_what_is_saved():
    plan = GuidanceStack([inherit.Config(scale=3, first=0.2, layers="deep")]).plan(model(), 10)
    layers = [n for n, m in model().denoiser.named_modules() if [*m.parameters(recurse=False)]]
    kept = ("conv_in", "time_embedding", "down_blocks.0", "up_blocks.1", "conv_norm_out", "conv_out")
    outer = sum(name.startswith(kept) for name in layers)
    computed = f"inherit: 6 of 10 steps compute {outer} of the network's {len(layers)} layers"
    assert plan.notes == (f"{computed}, and inherit what the others give",)
    assert str(plan).endswith(plan.notes[0]) and plan.rows == (1,) * 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 2.5}, "scale of inherit is a number of steps, and 2.5 is no whole number"),
        ({"schedule": "cosine"}, "no strength that could be cosine: leave out schedule"),
        (
            {"layers": ["up_block.0"]},
            "inherit: no layer of 'tiny-sd' is called 'up_block.0'; did you mean 'up_blocks.0'",
        ),
        ({"first": 1}, "computes everything at each of the 5 steps: lower its first, which is 1"),
        ({"window": (0.7, 1.0)}, "computes everything at each of the 5 steps"),
    ],
)
def test_what_saves_nothing_is_said(options, message):
    with pytest.raises(UserError, match=message):
        GuidanceStack.of([{"inherit": options}]).plan(model(), 5)


def test_few_steps_are_warned_of_once_a_run(caplog):
    with caplog.at_level(logging.WARNING):
        drawn(stack_of(inherit.Config()), REQUESTS[:1], steps=3)
    assert [record.getMessage() for record in caplog.records if record.name == inherit.__name__] == [
        "inherit: 3 steps differ much from one another, and have little to inherit"
    ]
