"""MaxFusion: what is chosen where, in closed form; streams of ControlNets between their blocks; and what it costs."""

from __future__ import annotations

import functools

import diffusers
import numpy as np
import pytest
import torch
from control_nets import adapter, controlnet
from PIL import Image
from tiny import tiny_model

from visiontune.errors import UserError
from visiontune.guidance import control, maxfusion
from visiontune.guidance._controls import features
from visiontune.guidance._lockstep import lockstep
from visiontune.guidance._merging import Rule, correlation, relative_variance
from visiontune.guidance._network import Network
from visiontune.guidance.base import Point, Run
from visiontune.guidance.stack import GuidanceStack

STEPS = 2
LINES = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
RINGS = Image.radial_gradient("L").resize((16, 16)).convert("RGB")
SAME = {"rtol": 0, "atol": 0}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def streams(*given):
    """[k, b, c, h, w] of features, and that all of them are there."""
    x = torch.stack(given)
    return x, torch.ones(x.shape[:2], dtype=torch.bool)


A, B = drawn(2, 6, 4, 5, seed=1), 3 * drawn(2, 6, 4, 5, seed=2)


@functools.cache
def model():
    made = tiny_model("sd")
    made.pipe.scheduler = made.sampler("ddim")
    return made


def net(seed, kind="ControlNet"):
    return made(seed, kind)


@functools.cache
def made(seed, kind):
    return controlnet(model().denoiser, seed) if kind == "ControlNet" else adapter(seed)


def config(kind="ControlNet", one=None, other=None, **options):
    controls = [
        control.Config(net=net(1, kind), picture=LINES, **(one or {})),
        control.Config(net=net(2, kind), picture=RINGS, **(other or {})),
    ]
    return maxfusion.Config(controls=controls, **options)


def call(rows=2):
    return {
        "sample": drawn(rows, 4, 8, 8, seed=3),
        "timestep": torch.tensor([700, 300])[:rows],
        "encoder_hidden_states": drawn(rows, 5, 32, seed=4),
        "added_cond_kwargs": None,
    }


def fed(term, arguments, levels=(0.5, 0.5)):
    """What the UNet is given, as one tuple."""
    x = arguments["sample"][: len(levels)]
    point = Point(x=x, t=torch.tensor(levels), levels=levels, schedule=None, run=Run(shape=x.shape[1:]))
    found = term.fed(Network.of_model(model()), arguments, point)
    inside = found.get("down_intrablock_additional_residuals")
    if inside is not None:
        return tuple(inside)
    return (*found["down_block_additional_residuals"], found["mid_block_additional_residual"])


def plain(one, arguments, **options):
    return fed(control.Config(net=one.net, picture=one.picture, **options), arguments)


def equal(found, expected, **tolerance):
    torch.testing.assert_close(tuple(found), tuple(expected), **(tolerance or SAME))


# -- the rule ----------------------------------------------------------------------------------------------------


def test_it_is_the_equation():
    """Place by place, in numpy."""
    a, b = A.clone(), B.clone()
    b[0, :, 1, 2] = 2 * a[0, :, 1, 2] + 1
    x, on = streams(a, b)
    found, inner = Rule().final(x, on), Rule().inner(x, on)
    relative = [one.var(1, correction=0) / one.var(1, correction=0).sum((1, 2), keepdim=True) for one in (a, b)]
    for i, row, column in np.ndindex(2, 4, 5):
        pair = np.stack([one[i, :, row, column].numpy() for one in (a, b)]).astype(np.float64)
        first = bool(relative[0][i, row, column] >= relative[1][i, row, column])
        expected, each = (
            pair[0 if first else 1],
            [pair[0 if first else 1] * pair[k].std() / pair[1 - first].std() for k in (0, 1)],
        )
        if np.corrcoef(pair)[0, 1] > 0.7:
            expected, each = pair.mean(0), [pair.mean(0)] * 2
        np.testing.assert_allclose(found[i, :, row, column], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(inner[:, i, :, row, column], each, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0, :, 1, 2], (a + b)[0, :, 1, 2] / 2)
    taken = [(found == one).all(1).float().mean() for one in (a, b)]
    assert min(taken) > 0.2


def test_of_two_alike_it_is_either():
    x, on = streams(A, A)
    assert torch.equal(Rule().final(x, on), A)
    assert torch.equal(Rule().inner(x, on), x)


def test_what_says_nothing_changes_nothing():
    nothing = torch.zeros_like(A)
    for rule in (Rule(), Rule(tau=0.5)):
        for pair in ((A, nothing), (nothing, A)):
            equal([rule.final(*streams(*pair))], [A], rtol=1e-6, atol=1e-7)
    blank = Rule().final(*streams(nothing, nothing))
    assert torch.equal(blank, nothing) and torch.equal(Rule(tau=1.0).inner(*streams(nothing, nothing))[0], nothing)
    assert torch.equal(correlation(A, nothing), torch.zeros(2, 1, 4, 5))
    assert torch.equal(relative_variance(nothing), torch.zeros(2, 1, 4, 5))


def test_their_order_is_none():
    x, on = streams(A, B)
    assert torch.equal(Rule().final(x.flip(0), on), Rule().final(x, on))
    assert torch.equal(Rule().inner(x.flip(0), on), Rule().inner(x, on).flip(0))


def test_thresholds_beyond_correlations_choose_or_average():
    x, on = streams(A, B)
    chosen = Rule(threshold=1.01).final(x, on)
    assert ((chosen == A) | (chosen == B)).all()
    assert torch.equal(Rule(threshold=-1.01).final(x, on), (A + B) / 2)


def test_rows_do_not_see_each_other():
    x, on = streams(A, B)
    for way in (Rule().final, Rule().inner, Rule(tau=0.3).final):
        whole = way(x, on)
        for row in (0, 1):
            alone = way(x[:, row : row + 1], on[:, :1])
            assert torch.equal(alone, whole[..., row : row + 1, :, :, :])


def test_soft_shares_go_over_to_the_hard_choice():
    x, on = streams(A, B)
    never = 1.01
    v = relative_variance(x)
    shares = v.sqrt() / v.sqrt().sum(0)
    soft = Rule(threshold=never, tau=2.0).final(x, on)
    equal([soft], [(shares * x).sum(0)], rtol=1e-5, atol=1e-6)
    equal([Rule(threshold=never, tau=1e-4).final(x, on)], [Rule(threshold=never).final(x, on)], rtol=1e-6, atol=1e-6)


def test_more_than_two_are_averaged_where_every_pair_agrees():
    c = A + 0.01 * drawn(2, 6, 4, 5, seed=5)
    found = Rule().final(*streams(A, c, A))
    equal([found], [(A + c + A) / 3], rtol=1e-6, atol=1e-6)
    x, on = streams(A, c, B)
    largest = relative_variance(x).argmax(0)
    different = (correlation(A, B) <= 0.7) | (correlation(c, B) <= 0.7)
    expected = torch.stack([A, c, B]).gather(0, largest.expand_as(A)[None])[0]
    assert different.float().mean() > 0.8
    assert torch.equal(Rule().final(x, on).where(different, 0), expected.where(different, 0))


def test_low_precision_is_decided_in_float32():
    wide = 1e3 * drawn(1, 1280, 2, 2, seed=6)
    x, on = streams(wide.half(), 0.9 * wide.half().flip(1))
    expected = Rule().final(x.float(), on)
    equal([Rule().final(x, on)], [expected.half()])


def test_what_is_left_out_of_a_row_is_no_zero():
    x, _ = streams(A, B)
    on = torch.tensor([[True, True], [True, False]])
    for rule in (Rule(), Rule(tau=0.4), Rule(threshold=-1.01)):
        found = rule.final(x, on)
        assert torch.equal(found[1], A[1])
        equal([found[:1]], [rule.final(x[:, :1], on[:, :1])], rtol=1e-6, atol=1e-6)
        assert not rule.final(x, torch.tensor([[True, False], [True, False]]))[1].any()


# -- the nets ----------------------------------------------------------------------------------------------------


def test_in_step_alone_a_net_gives_what_it_gives():
    arguments, shown = call(), drawn(1, 3, 16, 16, seed=8).clamp(0, 1)
    there = torch.ones(2, 2, dtype=torch.bool)
    (found,) = lockstep([net(1)], arguments, [shown], Rule(), there[:1])
    equal(found, features(net(1), arguments, shown))
    # And two alike that see the same, too, whatever is merged on the way.
    for found in lockstep([net(1), net(1)], arguments, [shown, shown], Rule(), there):
        equal(found, features(net(1), arguments, shown))


def test_streams_are_merged_after_each_block():
    """Every input of a block is what the rule makes of the outputs of those before it."""
    arguments, seen = call(), {}
    shown = [drawn(1, 3, 16, 16, seed=seed).clamp(0, 1) for seed in (8, 9)]

    def note(name):
        def hook(module, args, out):
            seen[name] = args[0], out

        return hook

    handles = [
        getattr(one, part).register_forward_hook(note((i, part)))
        for i, one in enumerate((net(1), net(2)))
        for part in ("conv_in", "controlnet_cond_embedding", "mid_block", "controlnet_mid_block")
    ] + [
        block.register_forward_hook(note((i, j)))
        for i, one in enumerate((net(1), net(2)))
        for j, block in enumerate([*one.down_blocks, *one.controlnet_down_blocks])
    ]
    lockstep([net(1), net(2)], arguments, shown, Rule(), torch.ones(2, 2, dtype=torch.bool))
    for handle in handles:
        handle.remove()

    def inner(*made):
        return Rule().inner(*streams(*made))

    begun = inner(*(seen[i, "conv_in"][1] + seen[i, "controlnet_cond_embedding"][1] for i in (0, 1)))
    middle = inner(*(seen[i, "mid_block"][1] for i in (0, 1)))
    first, second = ([inner(*pair) for pair in zip(*(seen[i, j][1][1] for i in (0, 1)), strict=True)] for j in (0, 1))
    for i in (0, 1):
        skips = [seen[i, 2 + j][0] for j in range(4)]
        equal(skips, [layer[i] for layer in (begun, *first, *second)])
        entered = seen[i, 0][0], seen[i, 1][0], seen[i, "mid_block"][0], seen[i, "controlnet_mid_block"][0]
        equal(entered, (begun[i], first[-1][i], second[-1][i], middle[i]))


@pytest.mark.parametrize("kind", ["ControlNet", "T2I-Adapter"])
def test_the_ends_are_merged_as_strong_as_each_is(kind):
    term = config(kind, {"scale": 0.5}, {"scale": 2.0}, merge="final", scale=0.3, threshold=-1.01)
    one, other = term.controls
    arguments = call()
    summed = [0.5 * a + 2.0 * b for a, b in zip(plain(one, arguments), plain(other, arguments), strict=True)]
    # Averages alone are half of what adding up gives.
    equal(fed(term, arguments), [0.3 * each / 2 for each in summed], rtol=1e-5, atol=1e-6)
    hard = fed(config(kind, merge="final"), arguments)
    pairs = zip(plain(one, arguments), plain(other, arguments), strict=True)
    equal(hard, [Rule().final(*streams(*pair)) for pair in pairs])


def test_outside_of_its_window_a_control_is_left_out():
    arguments = call()
    for merge in ("full", "final"):
        term = config(one={"window": (0.6, 1.0)}, merge=merge)
        equal(fed(term, arguments), plain(term.controls[1], arguments))
        # Of rows at two levels, each is what it is alone.
        both = fed(term, arguments, levels=(0.7, 0.5))
        second = {name: value if value is None else value[1:] for name, value in arguments.items()}
        equal([one[1:] for one in both], fed(term, second, levels=(0.5,)), rtol=0, atol=1e-5)
    later = {"window": (0.0, 0.4)}
    assert GuidanceStack([config(one=later, other=later)]).plan(model(), 2).acting == ((), ("maxfusion",))


def test_calls_of_fewer_rows_are_merged_alike():
    """On pipelines that see both sides in one call, perturbations call the network for one of them."""
    term = config("T2I-Adapter", one={"window": (0.4, 1.0)})
    equal(fed(term, call(rows=1), levels=(0.5, 0.5)), fed(term, call(rows=1), levels=(0.5,)))


def test_it_costs_what_adding_up_costs():
    calls, arguments = [], call()
    parts = [part for seed in (1, 2) for part in (*net(seed).down_blocks, net(seed).mid_block)]
    handles = [part.register_forward_pre_hook(lambda module, args: calls.append(id(module))) for part in parts]
    for merge in ("full", "final"):
        calls.clear()
        fed(config(merge=merge), arguments)
        assert sorted(calls) == sorted(map(id, parts))
    for handle in handles:
        handle.remove()
    plan = GuidanceStack([config()]).plan(model(), STEPS)
    assert plan.rows == (1, 1) and plan.total().count("in 2 of the steps, whatever the network sees") == 2


@pytest.mark.parametrize("merge", ["full", "final"])
def test_pipelines_of_controls_draw_the_same_by_the_wrapper(merge):
    nets = [net(1), net(2)]
    merged = maxfusion.MaxFusionControlNet(nets, merge=merge)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **{k: v for k, v in model().pipe.components.items()}, controlnet=merged, requires_safety_checker=False
    )
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "np"}
    noise = drawn(1, *model().latent_shape(), seed=9)
    for one in (pipe, model().pipe):
        one.set_progress_bar_config(disable=True)
    scales = {"controlnet_conditioning_scale": [0.7, 1.5], "control_guidance_end": [1.0, 0.5]}
    expected = pipe("a red circle", image=[LINES, RINGS], latents=noise, **options, **scales).images
    term = config(one={"scale": 0.7}, other={"scale": 1.5, "window": (0.5, 1.0)}, merge=merge)
    with GuidanceStack([term]).attach(model().pipe):
        found = model().pipe("a red circle", latents=noise, **options).images
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="maxfusion does not know guess_mode"):
        pipe("a red circle", image=[LINES, RINGS], guess_mode=True, **options)


def test_what_cannot_be_is_said():
    def refused(message, *controls, **options):
        with pytest.raises(UserError, match=message):
            GuidanceStack([maxfusion.Config(controls=list(controls), **options)]).plan(model(), STEPS)

    one, other = config().controls
    light = config("T2I-Adapter").controls
    refused("two controls or more, not 1", one)
    refused("merges nets of one kind, not ControlNet and T2I-Adapter", one, light[0])
    refused("T2I-Adapters are merged at the end alone", *light, merge="full")
    shallow = control.Config(net=adapter(1, channels=(16,)), picture=LINES)
    refused("have other levels than each other", light[0], shallow)
    refused("made for another base", light[0], control.Config(net=adapter(1, channels=(16, 24)), picture=LINES))
    refused("control 2 acts at none of the steps", one, control.Config(net=net(2), picture=LINES, window=(0.2, 0.21)))
    pooled = controlnet(model().denoiser, 3)
    pooled.register_to_config(global_pool_conditions=True)
    refused("has no places to merge", one, control.Config(net=pooled, picture=LINES))
    backwards = controlnet(model().denoiser, 3)
    backwards.register_to_config(controlnet_conditioning_channel_order="bgr")
    refused("or of BGR, cannot go in step", other, control.Config(net=backwards, picture=LINES))
