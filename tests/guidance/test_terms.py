"""The equations of the terms, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from visiontune.diffusion.schedule import Schedule
from visiontune.errors import UserError
from visiontune.guidance import apg, cfg, cfg_zero, pag, rescale, seg
from visiontune.guidance._features import grid_of
from visiontune.guidance.base import Point
from visiontune.guidance.stack import GuidanceStack

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SHAPE = (2, 3, 4, 5)


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sides():
    """u and c [2, 3, 4, 5]."""
    return drawn(*SHAPE, seed=1), drawn(*SHAPE, seed=2)


def point(levels=(0.6, 0.3), schedule=None):
    t = torch.tensor(levels, dtype=torch.float64) * 1000
    return Point(x=drawn(*SHAPE, seed=3), t=t, levels=levels, schedule=schedule or Schedule.flow())


def noise_schedule(prediction):
    alphas = torch.linspace(0.99, 0.1, 1001, dtype=torch.float64)
    return Schedule(
        prediction=prediction, alphas=alphas, sigmas=(1 - alphas**2).sqrt(), num_train_timesteps=1000, spacing=None
    )


def test_cfg_goes_from_u_through_c():
    u, c = sides()
    assert torch.equal(cfg.Config(scale=4).combine(u, c, 4.0, point()), u + 4.0 * (c - u))


def test_rescale_gives_each_row_the_deviation_of_the_prompts():
    p, c = sides()
    whole = rescale.Config(scale=1).control(p, c, 1.0)
    torch.testing.assert_close(whole.flatten(1).std(1), c.flatten(1).std(1), **EXACT)
    half = rescale.Config(scale=0.5).control(p, c, 0.5)
    torch.testing.assert_close(half, (whole + p) / 2, **EXACT)


def test_cfg_zero_projects_the_prompts_side_on_the_negative_one():
    u, c = sides()
    found = cfg_zero.Config(scale=3).combine(u, c, 3.0, point())
    for row in range(2):
        a = float((c[row] * u[row]).sum() / (u[row] ** 2).sum())
        torch.testing.assert_close(found[row], a * u[row] + 3 * (c[row] - a * u[row]), **EXACT)
    torch.testing.assert_close(cfg_zero.Config(scale=3).combine(c, c, 3.0, point()), c, **EXACT)


def test_cfg_zero_takes_no_flow_from_its_level_on():
    u, c = sides()
    found = cfg_zero.Config(scale=3, zero=0.5).combine(u, c, 3.0, point(levels=(0.6, 0.3)))
    assert not found[0].any() and found[1].any()
    # What does not guide stops nothing.
    one = cfg_zero.Config(scale=3, zero=0.5, window=(0.0, 0.4))
    assert one.combine(u, c, one.amount((0.6, 0.3), c), point(levels=(0.6, 0.3)))[0].any()


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_apg_is_its_algorithm_in_clean_pictures(prediction):
    schedule = Schedule.flow() if prediction == "flow" else noise_schedule(prediction)
    term = apg.Config(scale=4, eta=0.3, momentum=-0.5, threshold=2.0)
    memory, before = {}, 0.0
    for seed, levels in ((0, (0.6, 0.3)), (1, (0.5, 0.2))):
        u, c = drawn(*SHAPE, seed=10 + seed), drawn(*SHAPE, seed=20 + seed)
        at = Point(**{**vars(point(levels, schedule)), "memory": memory})
        found = schedule.to_x_0(term.combine(u, c, 4.0, at), at.x, at.t)
        clean_u, clean_c = (schedule.to_x_0(side, at.x, at.t) for side in (u, c))
        before = clean_c - clean_u - 0.5 * before
        for row in range(2):
            step, towards = before[row].flatten(), clean_c[row].flatten()
            step = step * min(1, 2.0 / float(step.norm()))
            towards = towards / towards.norm()
            along = (step @ towards) * towards
            across = step - along
            assert abs(float(across @ towards)) < 1e-10
            expected = clean_c[row].flatten() + 3 * (across + 0.3 * along)
            torch.testing.assert_close(found[row].flatten(), expected, rtol=1e-9, atol=1e-9)


def test_apg_without_its_parts_is_cfg():
    u, c = sides()
    plain = apg.Config(scale=4, eta=1, momentum=0, threshold=None)
    torch.testing.assert_close(plain.combine(u, c, 4.0, point()), u + 4 * (c - u), **EXACT)
    assert not plain.remembers and apg.Config(scale=4).remembers and not apg.Config(scale=1).remembers


def test_strengths_follow_window_and_schedule():
    levels = (1.0, 0.75, 0.5, 0.0)
    window = cfg.Config(scale=5, window=(0.25, 0.75))
    assert [window.at(level) for level in levels] == [1, 5, 5, 1]
    linear = cfg.Config(scale=5, schedule="linear")
    assert [linear.at(level) for level in levels] == [1, 3, 5, 9]
    cosine = pag.Config(scale=5, schedule="cosine")
    assert [cosine.at(level) for level in levels] == pytest.approx([0, 5 * (1 + math.cos(0.75 * math.pi)), 5, 10])
    assert window.amount((0.5, 0.5), drawn(2, 3)) == 5
    assert window.amount((1.0, 0.5), drawn(2, 3)).tolist() == [[1], [5]]


def softmax_with_identity(q, k, v, words, length):
    """PAG's attention as products and a softmax, whose map from picture to picture is the identity."""
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    for row in range(length):
        for column in range(length):
            if row not in words and column not in words and row != column:
                logits[..., row, column] = float("-inf")
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("words", [slice(0, 0), slice(0, 2), slice(-2, None)])
def test_pag_attends_by_the_identity(words):
    q, k, v = (drawn(2, 2, 7, 4, seed=seed) for seed in range(3))
    expected = softmax_with_identity(q, k, v, range(*words.indices(7)), 7)
    torch.testing.assert_close(pag.identity(q, k, v, None, words), expected, **EXACT)


def test_pag_keeps_a_mask_and_shared_heads():
    q, k, v = drawn(1, 4, 5, 4), drawn(1, 2, 5, 4, seed=1), drawn(1, 2, 5, 4, seed=2)
    assert torch.equal(pag.identity(q, k, v, None, slice(0, 0), enable_gqa=True), v[:, [0, 0, 1, 1]])
    hidden = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    hidden[..., 0] = False
    bias = torch.zeros(1, 1, 1, 5, dtype=torch.float64).masked_fill(~hidden, float("-inf"))
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    found = [pag.identity(q, k, v, mask, slice(0, 2))[..., 2:, :] for mask in (hidden, bias)]
    torch.testing.assert_close(*found, **EXACT)
    without = pag.identity(q[..., 1:, :], k[..., 1:, :], v[..., 1:, :], None, slice(0, 1))[..., 1:, :]
    torch.testing.assert_close(found[0], without, **EXACT)


def test_seg_blurs_from_nothing_to_the_mean():
    q = drawn(1, 2, 12, 4)
    torch.testing.assert_close(seg.blur(q, 1e-3, (3, 4)), q, **EXACT)
    mean = q.mean(-2, keepdim=True).expand_as(q)
    assert torch.equal(seg.blur(q, None, None), mean)
    torch.testing.assert_close(seg.blur(q, 1e6, (3, 4)), mean, rtol=1e-6, atol=1e-6)
    weights = torch.exp(-(torch.arange(3, dtype=torch.float64) ** 2) / 8)
    rows = q.view(1, 2, 3, 4, 4)
    first = (rows * (weights / weights.sum()).view(3, 1, 1)).sum(2)
    columns = torch.exp(-(torch.arange(4, dtype=torch.float64) ** 2) / 8)
    corner = (first * (columns / columns.sum()).view(4, 1)).sum(2)
    torch.testing.assert_close(seg.blur(q, 2.0, (3, 4))[..., 0, :], corner, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("words", [slice(0, 2), slice(-2, None), slice(0, 0)])
def test_seg_leaves_the_queries_of_words(words):
    q = drawn(1, 2, 8, 4)
    found = seg.Config(sigma=None)._queries(q, words, (2, 3))
    kept = range(*words.indices(8))
    for token in range(8):
        picture = q[..., [i for i in range(8) if i not in kept], :].mean(-2)
        torch.testing.assert_close(found[..., token, :], q[..., token, :] if token in kept else picture, **EXACT)


def test_a_grid_is_found_of_the_number_of_tokens():
    for tokens, ratio, grid in ((24, (8, 12), (4, 6)), (24, (96, 64), (6, 4)), (6, (5, 8), (2, 3))):
        assert grid_of(tokens, ratio, "seg", "") == grid
    with pytest.raises(UserError, match="seg finds no grid of 7 tokens like 8x8: set its sigma to null"):
        grid_of(7, (8, 8), "seg", "set its sigma to null")


def test_a_recipe_lists_terms():
    stack = GuidanceStack.of([{"cfg": 4}, {"pag": {"scale": 2, "layers": ["mid", 1]}}, "rescale"])
    assert stack == GuidanceStack([cfg.Config(scale=4), pag.Config(scale=2, layers=["mid", "1"]), rescale.Config()])
    assert stack.contrasts and not GuidanceStack([cfg.Config(scale=1)]).contrasts


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([{"cgf": 4}], r"guidance\[0\].name: 'cgf' is not one of the guidance; did you mean 'cfg'"),
        ([{"cfg": {"scale": 4, "windw": [0, 1]}}], r"guidance\[0\].*windw.*did you mean 'window'"),
        ([{"cfg": 4}, {"apg": 4}], "cfg and apg both say how the negative prompt acts"),
        ([{"pag": {"window": [0.7, 0.2]}}], "lower one first, not 0.7 and 0.2"),
        ([{"cfg": 4, "pag": 2}], "must be a term and its options"),
        (["cfg"], "scale is missing"),
        ([{"cfg": {"scale": 4, "name": "apg"}}], "is called 'cfg' already: take name out"),
        ([{"embedded": 2}, {"embedded": 3}], "embedded and embedded both"),
    ],
)
def test_mistakes_in_a_recipe_are_said(specs, message):
    with pytest.raises(UserError, match=message):
        GuidanceStack.of(specs)


@pytest.mark.parametrize(
    "spec", [5, None, [], {}, {1: 2}, {None: None}, {"cfg": []}, {"cfg": {1: 2}}, {"pag": {"layers": {}}}]
)
def test_whatever_stands_for_a_term_is_refused_in_one_line(spec):
    with pytest.raises(UserError) as caught:
        GuidanceStack.of([spec])
    assert "\n" not in str(caught.value)


def test_attention_of_other_layers_is_not_touched():
    """The tap sees the call that a layer makes, and no other."""
    from visiontune.guidance._taps import attending

    class Layer(torch.nn.Module):
        def forward(self, x):
            return scaled_dot_product_attention(x, x, x)

    class Other(torch.nn.Module):
        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ x

    one, other, x = Layer(), Layer(), drawn(1, 2, 5, 4)
    plain = one(x)
    with attending({"one": one}, "pag", lambda name: lambda q, k, v, mask, **call: v) as check:
        assert torch.equal(one(x), x) and torch.equal(other(x), plain)
        check()
    assert torch.equal(one(x), plain) and "forward" not in vars(one)
    two = Other()
    with attending({"two": two}, "pag", lambda name: lambda q, k, v, mask, **call: v) as check:
        check()  # it was not called, as where a part of the network is not computed at a step
        two(x)
        with pytest.raises(UserError, match="layer 'two' uses another kernel"):
            check()
