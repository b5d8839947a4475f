"""What the methods of search keep, on tiny pipelines, and what they cannot do."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_model

from visiontune.core import Request
from visiontune.diffusion.dynamics import DDIM
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.models.pipeline import own_generator
from visiontune.ops.pixels import shown, to_tensor, to_uint8
from visiontune.rewards.loading import load
from visiontune.sampling.pipeline import images, pictures, prepared
from visiontune.sampling.searched import Searcher
from visiontune.search import best_of, fk, zero_order
from visiontune.search.asked import Asked
from visiontune.search.base import nth

PROMPTS = ["a red circle", "green triangle"]
REQUESTS = [Request(prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
DRAWING = {"steps": 2, "cfg_scale": 2.0, "batch_size": 2}
BRIGHT = load("brightness")


@functools.cache
def model(family="sd"):
    return tiny_model(family)


def searcher(method, family="sd", **options):
    asked = Asked(method=method, reward="brightness")
    return Searcher.of(asked, model(family), **{**DRAWING, **options})


def found(method, family="sd", requests=REQUESTS, **options):
    return [one for one, _ in searcher(method, family, **options)(requests)]


def drawn(requests=REQUESTS, family="sd", **options):
    prompts, seeds = [one.prompt for one in requests], [one.seed for one in requests]
    return images(model(family), prompts, seeds, **{**DRAWING, **options})


def brightness(pictures):
    return BRIGHT(to_tensor(pictures), [""] * len(pictures)).tolist()


def test_best_of_one_is_the_plain_run_to_the_bit():
    stack = GuidanceStack.of([{"cfg": 3}, {"rescale": 0.5}])
    for options in ({}, {"guidance": stack, "scheduler": "euler"}):
        plain = drawn(**options)
        for one, picture in zip(found(best_of.Config(n=1), **options), plain, strict=True):
            np.testing.assert_array_equal(one.picture, picture)
            assert one.reward == one.plain_reward and one.record["kept"] == 0


def test_best_of_more_is_never_worse_and_says_what_it_threw_away():
    few, many = found(best_of.Config(n=2)), found(best_of.Config(n=4))
    for i, (less, more) in enumerate(zip(few, many, strict=True)):
        rewards = [row["reward"] for row in more.record["drawn"]]
        assert more.reward == max(rewards) >= less.reward == max(rewards[:2]) >= less.plain_reward == rewards[0]
        assert more.record["drawn"][:2] == less.record["drawn"]
        assert len({row["seed"] for row in more.record["drawn"]}) == 4
        again = [Request(prompt=PROMPTS[i], seed=row["seed"]) for row in more.record["drawn"]]
        pictures = drawn(again)
        assert brightness(pictures) == pytest.approx(rewards, abs=1e-3)
        np.testing.assert_array_equal(pictures[more.record["kept"]], more.picture)
    assert any(one.reward > one.plain_reward for one in many)


def test_best_of_tokens():
    made = found(best_of.Config(n=3), "amused")
    assert all(one.reward == max(row["reward"] for row in one.record["drawn"]) for one in made)
    np.testing.assert_array_equal([one.plain for one in made], drawn(family="amused"))


def test_zero_order_goes_on_from_the_best_and_never_gets_worse():
    runs = [found(zero_order.Config(n=2, iterations=k, radius=0.5)) for k in (1, 3)]
    assert any(row["around"] for one in runs[1] for row in one.record["drawn"][3:]), "something was better"
    for short, long in zip(*runs, strict=True):
        records = long.record["drawn"]
        assert records[:3] == short.record["drawn"] and len(records) == 7
        rewards = [row["reward"] for row in records]
        assert long.reward == max(rewards) >= short.reward == max(rewards[:3]) >= short.plain_reward == rewards[0]
        for begin in (1, 3, 5):
            best = rewards.index(max(rewards[:begin]))
            assert [row["around"] for row in records[begin : begin + 2]] == [best] * 2
        assert len({*rewards}) == 7


def test_zero_order_says_enough_to_draw_everything_again():
    method, made = zero_order.Config(n=2, iterations=3, radius=0.5), model()
    for request, one in zip(REQUESTS, found(method), strict=True):
        records, noises = one.record["drawn"], [made.start_noise(request)]
        for row in records[1:]:
            fresh = made.start_noise(Request(prompt=request.prompt, seed=row["seed"]))
            noises.append(method.perturbed(noises[row["around"]], fresh))
        guided, size = prepared(made, DRAWING["cfg_scale"], None, 2, None, None)
        drawing = {"steps": 2, "guidance": guided, "size": size, "batch_size": 2, "scheduler": "model"}
        again = pictures(made, [replace(request, noise=noise) for noise in noises], **drawing)
        assert brightness(again) == pytest.approx([row["reward"] for row in records], abs=1e-4)
        np.testing.assert_allclose(again[one.record["kept"]].astype(int), one.picture, atol=2)


def test_zero_order_of_fresh_noise_draws_what_the_seeds_draw():
    for i, one in enumerate(found(zero_order.Config(n=2, iterations=1, radius=1.0))):
        again = [Request(prompt=PROMPTS[i], seed=row["seed"]) for row in one.record["drawn"]]
        pictures = drawn(again)
        np.testing.assert_array_equal(pictures[one.record["kept"]], one.picture)
        assert brightness(pictures) == pytest.approx([row["reward"] for row in one.record["drawn"]], abs=1e-3)


def test_noise_of_its_own_must_fit_what_a_picture_starts_from():
    drawing = {"steps": 2, "guidance": model().guidance(1.0)}
    own = Request(prompt="x", seed=3, noise=model().start_noise(Request(prompt="x", seed=3)))
    plain = model().draw([Request(prompt="x", seed=3)], **drawing)
    np.testing.assert_array_equal(model().draw([own], **drawing), plain)
    with pytest.raises(ValueError, match="noise of shape"):
        model().draw([replace(own, noise=torch.zeros(1, 2, 2))], **drawing)
    with pytest.raises(UserError, match="starts from masked tokens, not from noise"):
        model("amused").draw([own], steps=2, guidance=model("amused").guidance(1.0))


def test_perturbed_noise_stays_a_standard_gaussian_and_near():
    best, fresh = torch.randn(2, 100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for radius in (0.1, 0.4, 1.0):
        near = zero_order.Config(radius=radius).perturbed(best, fresh)
        assert float(near.var()) == pytest.approx(1, abs=0.02)
        assert float((near * best).mean()) == pytest.approx((1 - radius**2) ** 0.5, abs=0.02)


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_fk_without_a_strength_keeps_the_best_of_independent_rollouts(family):
    made, cfg = model(family), 2.0
    method = fk.Config(n=3, scale=0.0, every=1, least=1.0)
    for i, one in enumerate(found(method, family, cfg_scale=cfg)):
        asked = [nth(REQUESTS[i], k) for k in range(3)]
        start = Start(generator=[own_generator(each) for each in asked])
        with torch.no_grad():
            final = rollout(
                made,
                made.embed([PROMPTS[i]] * 3),
                guidance=made.guidance(cfg),
                chain=2,
                dynamics=DDIM(eta=1.0),
                start=start,
            ).final
            pictures = to_uint8(shown(made.decode(final)))
        rewards = brightness(pictures)
        assert [row["reward"] for row in one.record["drawn"]] == pytest.approx(rewards, abs=2e-3)
        assert [row["seed"] for row in one.record["drawn"]] == [each.seed for each in asked]
        near(one.picture, pictures[one.record["kept"]])
        near(one.plain, pictures[0])
        assert one.reward == max(row["reward"] for row in one.record["drawn"])
        assert [row["step"] for row in one.record["weighed"]] == [1]


def near(picture, other):
    """But for the rounding of batches of other shapes."""
    assert np.abs(picture.astype(int) - other.astype(int)).max() <= 2


def test_fk_gives_particles_up_and_is_the_same_again_alone_and_with_others():
    method = fk.Config(n=3, scale=1e6, every=1)
    one, again = found(method), found(method, batch_size=6)
    for i, (each, other) in enumerate(zip(one, again, strict=True)):
        (weighed,) = each.record["weighed"]
        best = int(np.argmax(weighed["rewards"]))
        assert weighed["from"] == [best] * 3
        near(each.picture, other.picture)
        near(each.picture, found(method, requests=[REQUESTS[i]])[0].picture)
    same = found(method)
    np.testing.assert_array_equal([each.picture for each in one], [each.picture for each in same])
    assert [each.record for each in one] == [each.record for each in same]


def test_fk_keeps_one_drawn_by_weight():
    made = found(fk.Config(n=4, scale=1e5, every=1, least=0.0, keep="drawn"))
    assert all(one.reward == max(row["reward"] for row in one.record["drawn"]) for one in made)
    asked = [Request(prompt="x", seed=seed) for seed in range(6)]
    even = found(fk.Config(n=4, scale=0.0, every=1, keep="drawn"), requests=asked, batch_size=24)
    assert any(one.reward < max(row["reward"] for row in one.record["drawn"]) for one in even)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (best_of.Config(n=3), "3 are drawn and 'brightness' scores 3; the network sees 12 pictures, 4 without search"),
        (zero_order.Config(n=2, iterations=2), "5 are drawn and 'brightness' scores 5; the network sees 20 pictures"),
        (fk.Config(n=2, every=1), "3 are drawn and 'brightness' scores 5; the network sees 12 pictures"),
    ],
)
def test_the_plan_is_what_is_called(method, expected):
    made = searcher(method)
    assert expected in made.plan()
    rows, scores, cost = [], [], method.cost(made.at)
    call, score = made.at.model.denoiser.forward, made.at.reward.score
    made.at.model.denoiser.forward = lambda x, *args, **kwargs: rows.append(len(x)) or call(x, *args, **kwargs)
    made.at.reward.score = lambda x, *args: scores.append(len(x)) or score(x, *args)
    try:
        made([REQUESTS[0]])
    finally:
        del made.at.model.denoiser.forward, made.at.reward.score
    assert (sum(rows), sum(scores)) == (cost.rows, cost.scores)


@pytest.mark.parametrize(
    ("method", "family", "options", "message"),
    [
        (zero_order.Config(), "amused", {}, "starts from masked tokens: take best_of"),
        (fk.Config(), "amused", {}, "has none: take best_of"),
        (fk.Config(every=1), "sd", {"scheduler": "euler"}, "leave scheduler=euler out"),
        (fk.Config(every=2), "sd", {}, "at none of 2 steps: lower every, or widen window"),
        (fk.Config(every=1, dynamics="flow-sde"), "sd", {}, "dynamics 'flow-sde' is for flow models"),
    ],
)
def test_what_a_method_cannot_search_with_is_one_line(method, family, options, message):
    with pytest.raises(UserError, match=message):
        searcher(method, family, **options)


def test_a_negative_prompt_without_effect_is_refused_by_fk():
    asked = [Request(prompt="x", negative="small")]
    with pytest.raises(UserError, match="a negative prompt has no effect"):
        found(fk.Config(every=1), requests=asked, cfg_scale=1.0)
    with_it, without = (found(fk.Config(n=2, every=1), requests=r)[0] for r in (asked, [Request(prompt="x")]))
    assert (with_it.plain != without.plain).any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("best_of", "search must be a mapping such as {best_of: 8, reward: pocket-clip}"),
        ({"reward": "brightness"}, "search needs one method beside reward and held_out, not 0; known: best_of, fk"),
        ({"best_of": 2, "fk": 2, "reward": "brightness"}, "not 2"),
        ({"best_off": 2, "reward": "brightness"}, "did you mean 'best_of'"),
        ({"best_of": 2}, "search.reward is missing"),
        ({"best_of": 2, "reward": "bright"}, "search.reward.name: 'bright' is not one of the rewards"),
        ({"best_of": 1, "reward": "brightness"}, "search.best_of.n must be"),
        ({"fk": {"n": 1}, "reward": "brightness"}, "search.fk.n must be"),
        ({"best_of": {"name": "x"}, "reward": "brightness"}, "take name out of its options"),
        ({"fk": {"dynamics": "ddim"}, "reward": "brightness"}, "'ddim' adds no noise, so copies of a particle"),
        ({"fk": {"window": [0.7, 0.2]}, "reward": "brightness"}, "the lower one first"),
    ],
)
def test_recipes_are_refused_in_one_line(spec, message):
    with pytest.raises(UserError) as caught:
        Asked.of(spec)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rewards_that_do_not_suit_a_search_are_refused():
    for spec, message in (
        ({"best_of": 2, "reward": "diversity"}, "compares the pictures of a prompt with each other"),
        ({"best_of": 2, "reward": "brightness", "held_out": "diversity"}, "search.held_out 'diversity' compares"),
        ({"best_of": 2, "reward": "brightness", "held_out": "brightness"}, "search.held_out is the reward"),
    ):
        with pytest.raises(UserError, match=message):
            Asked.of(spec).rewards()
