"""TokenCompose: its two losses in closed form, what they read of a network, and what they refuse."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from torch.nn.functional import binary_cross_entropy
from torch.utils.checkpoint import checkpoint

from visiontune.core import Batch
from visiontune.data.base import Sample
from visiontune.errors import UserError
from visiontune.guidance._probe import shares_of_words
from visiontune.objectives import denoising, tokencompose
from visiontune.objectives.base import Tools, generator
from visiontune.objectives.tokencompose import Config, pixel_loss, token_loss


def shares(heads: int = 3, side: int = 4, words: int = 6) -> torch.Tensor:
    return torch.randn(heads, side, side, words, generator=generator("shares"), dtype=torch.float64).softmax(-1)


def test_the_token_loss_in_closed_form():
    everywhere, left = torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    left[:, :1] = True
    assert token_loss(shares(), everywhere, [2, 3]) == pytest.approx(0)
    assert token_loss(shares(), ~everywhere, [2, 3]) == 1
    assert token_loss(torch.full((3, 4, 4, 6), 1 / 6, dtype=torch.float64), left, [2]) == pytest.approx((1 - 0.25) ** 2)
    # The mean over heads stands inside of the square, that over tokens outside, and the level does not count.
    found, own = shares(), [1, 4]
    rho = torch.stack([(found[..., k] * left).sum((1, 2)) / found[..., k].sum((1, 2)) for k in own]).mean(1)
    assert token_loss(found, left, own) == pytest.approx(float((1 - rho).square().mean()))
    assert token_loss(1e-3 * found, left, own) == pytest.approx(float(token_loss(found, left, own)))


def test_the_pixel_loss_takes_the_tokens_of_a_noun_for_one():
    found, mask = shares().mean(0), torch.rand(4, 4, generator=generator("mask")) > 0.5
    joined = torch.cat([found, found[..., [1, 4]].sum(-1, keepdim=True)], -1)
    assert pixel_loss(found, mask, [1, 4]) == pytest.approx(float(pixel_loss(joined, mask, [6])))
    assert pixel_loss(joined, mask, [6]) == pytest.approx(float(binary_cross_entropy(joined[..., 6], mask.double())))
    # Rounding may take a sum beyond 1.
    assert pixel_loss(torch.full((4, 4, 2), 0.6), mask, [0, 1]).isfinite()


@pytest.fixture(scope="module")
def model():
    return tiny_model("sd")


def rows(model, nouns=(("red", "circle"), ("blue square",))) -> Batch:
    prompts = ["a red circle", "a blue square"]
    shape = model.latent_shape()
    return Batch(
        prompts=prompts,
        data={
            "image": torch.randn(2, *shape, generator=generator("image")),
            "segments": torch.randint(4, (2, 1, *shape[1:]), generator=generator("bits"), dtype=torch.int32),
        },
        cond=None,
        weight=torch.ones(2),
        prior=torch.zeros(2, dtype=torch.bool),
        ids=["0", "1"],
        nouns=list(nouns),
    )


def gradients(model, objective, batch):
    model.main.requires_grad_(True).zero_grad()
    loss = objective.loss(model, batch, Tools(rng=generator(1)))
    loss.total.backward()
    return loss, [None if p.grad is None else p.grad.clone() for p in model.main.parameters()]


def test_weights_of_zero_leave_the_bits_of_denoising(model):
    _, ours = gradients(model, tokencompose.build(Config(token_weight=0, pixel_weight=0)), rows(model))
    _, plain = gradients(model, denoising.build(denoising.Config()), rows(model))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    _, other = gradients(model, tokencompose.build(Config(token_weight=1)), rows(model))
    assert not all(torch.equal(a, b) for a, b in zip(other, plain, strict=True))


def test_what_is_read_is_what_the_network_computes(model):
    """Shares are those of diffusers' own plain attention, and looking changes no prediction."""
    objective, batch = tokencompose.build(Config(layers=["all"])), rows(model)
    cond, x, t = model.embed(batch.prompts), batch.data["image"], torch.tensor([300, 700])
    layers, given = objective.layers(tokencompose.Network.of_model(model)), {}

    def note(name):
        return lambda module, args, kwargs: given.update({name: (args[0], kwargs["encoder_hidden_states"])})

    hooks = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    with torch.no_grad():
        plain = model.predict(x, t, cond)
        with objective.looking(model) as found:
            assert torch.equal(model.predict(x, t, cond), plain)
        assert found.keys() == layers.keys()
        for name, layer in layers.items():
            hidden, words = given[name]
            q, k = (layer.head_to_batch_dim(y) for y in (layer.to_q(hidden), layer.to_k(words)))
            theirs = layer.get_attention_scores(q, k).unflatten(0, (2, -1))
            torch.testing.assert_close(found[name].flatten(2, 3), theirs, rtol=1e-5, atol=1e-6)
    for hook in hooks:
        hook.remove()


def test_joint_attention_is_shared_out_among_the_words_alone():
    q, k = (torch.randn(1, 2, 7, 4, generator=generator(n), dtype=torch.float64) for n in "qk")
    found = shares_of_words(q, k, None, slice(0, 3), None)
    whole = (q @ k.mT / 2).softmax(-1)[:, :, 3:, :3]
    torch.testing.assert_close(found, whole / whole.sum(-1, keepdim=True))
    assert torch.equal(shares_of_words(q, k, None, None, None), (0.5 * q @ k.mT).softmax(-1))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_are_looked_at_too(family):
    model = tiny_model(family)
    loss, _ = gradients(model, tokencompose.build(Config()), rows(model))
    assert loss.total.isfinite() and float(loss.terms["token"]) > 0 and float(loss.terms["pixel"]) > 0


def test_checkpointing_changes_no_gradient_and_a_re_entrant_one_is_refused():
    model, objective = tiny_model("sd"), tokencompose.build(Config(token_weight=1, pixel_weight=1))
    _, plain = gradients(model, objective, rows(model))
    model.main.train()
    model.main.enable_gradient_checkpointing()
    _, again = gradients(model, objective, rows(model))
    for one, other in zip(again, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    model.main.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
    with pytest.raises(UserError, match="use_reentrant=False"):
        gradients(model, objective, rows(model))


def test_rows_without_a_caption_and_nouns_out_of_the_picture_do_not_count(model):
    objective, batch = tokencompose.build(Config()), rows(model)
    bare = Batch(**{**vars(batch), "prompts": ["", ""]})
    gone = Batch(**{**vars(batch), "data": {**batch.data, "segments": torch.zeros_like(batch.data["segments"])}})
    for one in (bare, gone):
        loss, _ = gradients(model, objective, one)
        assert float(loss.terms["token"]) == float(loss.terms["pixel"]) == 0
    half = Batch(**{**vars(batch), "nouns": [("red", "circle"), ()]})
    both, first = (gradients(model, objective, one)[0].terms["token"] for one in (half, batch[0]))
    assert float(both) > 0 and float(first) > 0


def test_a_noun_that_is_not_read_stops_the_run_before_its_first_step(model):
    objective = tokencompose.build(Config())

    def prepare(*samples):
        made = [Sample(id=str(i), sources={}, caption=c, nouns=n) for i, (c, n) in enumerate(samples)]
        return objective.prepare(model, SimpleNamespace(), made, None, Tools())

    assert prepare(("a red circle", ("circle", "red circle"))) == []
    behind = f"a red circle {'and a blue square ' * 30} and a green star"
    with pytest.raises(UserError, match=r"2 nouns are not among the words .*: 'star' of 1, 'cross' of 2"):
        prepare(("a red circle", ("circle",)), (behind, ("red", "star")), ("a red circle", ("cross",)))


def test_a_noun_that_is_read_in_part_counts_as_lost(model):
    """Somewhere along longer and longer captions the end of what is read falls between its words."""
    objective, ends = tokencompose.build(Config()), []
    for count in range(model.reader.limit):
        caption = f"circle {'a ' * count}red circle"
        try:
            tokencompose.places(model, caption, "red circle")
        except UserError:
            break
        try:
            objective.places(model, caption, "red circle")
        except UserError as error:
            ends.append(str(error))
    assert len(ends) == 1 and "is read in part" in ends[0]


def test_attention_moves_to_where_nouns_are(model):
    """Two nouns, left and right: after some steps of the network's words alone nearly all of it is inside."""
    model = tiny_model("sd")
    batch, objective = rows(model), tokencompose.build(Config(token_weight=1))
    side = model.latent_shape()[-1]
    halves = torch.ones(2, 1, side, side, dtype=torch.int32)
    halves[..., side // 2 :] = 2
    given = {"prompts": ["a red circle"] * 2, "nouns": [("red", "circle")] * 2}
    batch = Batch(**{**vars(batch), **given, "data": {**batch.data, "segments": halves}})
    model.main.requires_grad_(False)
    trained = [p for n, p in model.main.named_parameters() if n.startswith("mid_block") or ".attn2." in n]
    optimizer = torch.optim.Adam([p.requires_grad_(True) for p in trained], lr=0.02)
    told = []
    for step in range(24):
        loss = objective.loss(model, batch, Tools(rng=generator(step)))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        told.append(float(loss.terms["token"]))
    assert sum(told[-5:]) < 0.5 * sum(told[:5])
