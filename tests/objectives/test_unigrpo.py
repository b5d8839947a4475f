from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from tiny_online import batch_of, policy_trainer, tools_of
from tiny_tokens import SIDE, TOKENS, VOCABULARY, Bound, Free, base_of, move, seeded

from visiontune import adapters
from visiontune.errors import UserError
from visiontune.objectives import unigrpo
from visiontune.objectives._policy import clipped_surrogate
from visiontune.schema import from_mapping


def objective(**options):
    given = {"group": 4, "updates": 3, "steps": 4, "cfg_scale": 1.0, "masks": 1, "beta": 0.0}
    return unigrpo.build(from_mapping(unigrpo.Config, given | options))


def gradients(model, built, collected, part, tools):
    for parameter in model.parameters():
        parameter.grad = None
    loss = built.update(model, collected, part, tools)
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return loss, torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("coupled", [False, True])
def test_before_the_first_update_ratios_are_one_and_the_loss_is_zero(micro_batch, coupled):
    model, drifts = Bound(), []
    built = objective(micro_batch=micro_batch, masks=2, coupled=coupled)
    collected = built.collect(model, batch_of(4, 2), tools_of())
    assert sum(len(chunk.tokens) for chunk in collected.chunks) == 8
    built.require_ratio_one = lambda drift: drifts.append(drift.detach())
    loss, gradient = gradients(model, built, collected, 0, tools_of())
    assert torch.cat(drifts).abs().max() == 0 and abs(float(loss.total)) < 1e-12
    assert loss.terms["clip_fraction"] == 0 and gradient.norm() > 1e-3


def test_a_ratio_that_is_not_one_is_refused_at_the_first_update_alone():
    model, built = Bound(), objective()
    collected = built.collect(model, batch_of(4, 2), tools_of())
    move(model)
    with pytest.raises(UserError, match="before the first update a token's log-probability differs by"):
        built.update(model, collected, 0, tools_of())
    built.update(model, collected, 1, tools_of())


class TestMasks:
    def test_shares_go_from_a_random_one_to_all_in_equal_steps(self):
        assert unigrpo.mask_shares(0.25, 4) == [0.25, 0.5, 0.75, 1.0]
        assert unigrpo.mask_shares(0.25, 1) == [0.25]
        built = objective(updates=3, ratio_min=0.4, masks=40)
        hidden = built.masks_of(0, 1000, tools_of()).double().mean(-1)
        first = hidden[0]
        assert first.min() >= 0.4 and first.min() < 0.5 and first.max() > 0.9
        torch.testing.assert_close(hidden[1], (first + 1) / 2, rtol=0, atol=1e-3)
        assert (hidden[2] == 1).all()

    def test_one_token_at_least_is_masked(self):
        for share in (0.0, 0.01, 0.1):
            assert int(unigrpo.draw_mask(9, share, seeded(0)).sum()) == 1
        assert int(unigrpo.draw_mask(9, 1.0, seeded(0)).sum()) == 9
        assert int(unigrpo.draw_mask(9, 1.0, seeded(0), coupled=True).sum()) == 8

    def test_coupled_masks_cover_each_token_exactly_once(self):
        built = objective(masks=4, coupled=True)
        hidden = built.masks_of(3, 50, tools_of())
        assert hidden.shape == (3, 4, 50)
        lanes = hidden.view(3, 2, 2, 50).int().sum(2)
        assert (lanes == 1).all()
        assert (hidden.sum(-1) >= 1).all()
        assert not torch.equal(hidden[:, 0], hidden[:, 2])
        weights = built.weights(hidden[0][:, None])
        torch.testing.assert_close(weights.sum((0, 2)), torch.ones(1))
        torch.testing.assert_close(weights.sum(0), torch.full((1, 50), 1 / 50))

    def test_weights_are_means_over_masked_tokens(self):
        hidden = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 1, 1]]]).bool()
        expected = torch.tensor([[[1, 1, 0, 0], [2, 0, 0, 0]], [[0.5] * 4, [0, 0, 1, 1]]]) / 4
        torch.testing.assert_close(objective(masks=2).weights(hidden), expected)

    @pytest.mark.parametrize("same", [True, False])
    def test_a_group_is_masked_alike_if_asked_and_each_update_otherwise(self, same):
        built = objective(same_mask=same)
        hidden = built.hidden(200, torch.arange(8), tools_of()).view(3, 1, 2, 4, 200)
        alike = (hidden == hidden[:, :, :, :1]).all(-1).flatten(0, 2).all(-1)
        assert alike[:-2].all() == same and alike[-2:].all()  # the last update masks everything
        assert not torch.equal(hidden[:2, :, 0], hidden[:2, :, 1])
        assert not torch.equal(hidden[0], hidden[1])
        assert torch.equal(built.hidden(200, torch.arange(4, 8), tools_of()), hidden[:, :, 1])
        assert not torch.equal(built.hidden(200, torch.arange(8), tools_of(index=1)).view_as(hidden), hidden)

    def test_are_the_same_for_the_trained_the_old_and_the_base_model(self):
        """And only tokens of the picture are masked, the others being what was drawn."""
        model = Bound()
        built, tools = objective(beta=0.1, masks=2), tools_of(reference=base_of(model))
        built._precise = True  # what is asked about rounding comes besides
        model.seen.clear()
        collected = built.collect(model, batch_of(4, 2), tools)
        (chunk,) = collected.chunks
        old = model.seen[built.config.steps :]
        model.seen.clear()
        inputs = []
        for part in range(3):
            built.update(model, collected, part, tools)
            base, trained = model.seen[0::2], model.seen[1::2]
            assert len(base) == len(trained) == 2
            assert all(torch.equal(x, y) for x, y in zip(base, trained, strict=True))
            inputs += trained
            model.seen.clear()
        assert len(old) == 6 and all(torch.equal(x, y) for x, y in zip(old, inputs, strict=True))
        assert not torch.equal(inputs[0] == 6, inputs[2] == 6)
        for seen, hidden in zip(inputs, chunk.hidden.flatten(0, 1), strict=True):
            assert torch.equal(seen == model.mask_token, hidden)
            assert torch.equal(seen[~hidden], chunk.tokens[~hidden])
        assert chunk.tokens.max() < VOCABULARY


def test_the_estimate_is_exact_where_tokens_do_not_depend_on_each_other():
    model, built = Free(), objective(masks=5)
    (chunk,) = built.collect(model, batch_of(4, 2), tools_of()).chunks
    exact = model.table.log_softmax(-1)[torch.arange(TOKENS), chunk.tokens]
    torch.testing.assert_close(chunk.old, exact.expand_as(chunk.old).detach())
    # and is not where they do
    (chunk,) = built.collect(Bound(), batch_of(4, 2), tools_of()).chunks
    assert (chunk.old[:1] - chunk.old[2:]).abs().max() > 0.1


class TestDivergence:
    now, base = (torch.randn(VOCABULARY, generator=seeded(s), dtype=torch.float64).log_softmax(-1) for s in (3, 4))

    def test_k3_is_never_negative_zero_at_equality_and_has_the_exact_mean(self):
        found = unigrpo.k3(self.now, self.base)
        assert (found >= 0).all() and found.max() > 0.1
        assert not unigrpo.k3(self.now, self.now).any()
        exact = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=self.now), torch.distributions.Categorical(logits=self.base)
        )
        torch.testing.assert_close((self.now.exp() * found).sum(), exact)
        torch.testing.assert_close(unigrpo.exact_kl(self.now, self.base), exact)
        assert not torch.isclose(unigrpo.exact_kl(self.base, self.now), exact)

    @pytest.mark.parametrize("kl", ["exact", "k3"])
    def test_is_zero_at_the_base_and_pulls_back_to_it(self, kl):
        model = Free()
        built = objective(beta=1e4, kl=kl, same_mask=False)
        tools = tools_of(reference=base_of(model, 0.0))
        loss, _ = gradients(model, built, built.collect(model, batch_of(4, 2), tools), 0, tools)
        assert loss.terms["kl"] == 0
        tools = tools_of(reference=base_of(model))
        rows = batch_of(256, 1)
        built = objective(beta=1e4, kl=kl, group=256, updates=1, ratio_min=1.0)
        loss, gradient = gradients(model, built, built.collect(model, rows, tools), 0, tools)
        assert loss.terms["kl"] > 0.01
        before = model.table.detach().clone()
        with tools.reference():
            towards = (model.table - before).flatten().detach()
        assert float(gradient @ towards) < 0


@pytest.mark.parametrize("kl", ["exact", "k3"])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("score_cfg_scale", [1.0, 2.0])
def test_the_gradient_is_that_of_the_loss_in_one_graph(kl, coupled, score_cfg_scale):
    model = Bound()
    options = {"kl": kl, "coupled": coupled, "masks": 2, "beta": 0.3, "clip": 0.05, "score_cfg_scale": score_cfg_scale}
    built, tools = objective(**options, micro_batch=3), tools_of(reference=base_of(model))
    collected = built.collect(model, batch_of(4, 2), tools)
    move(model, 0.1)
    loss, found = gradients(model, built, collected, 1, tools)
    assert 0.05 < loss.terms["clip_fraction"] < 0.95

    def log_probs(tokens, hidden, cond):
        seen = torch.where(hidden, model.mask_token, tokens).view(-1, SIDE, SIDE)
        logits = model.logits(seen, cond)
        if score_cfg_scale != 1:
            without = model.logits(seen, model.unconditional(len(seen)))
            logits = without + score_cfg_scale * (logits - without)
        return logits.flatten(1, 2).log_softmax(-1)

    def everywhere():
        return [[log_probs(c.tokens, hidden, c.cond) for hidden in c.hidden[1]] for c in collected.chunks]

    with torch.no_grad(), tools.reference():
        bases = everywhere()
    total = 0
    for chunk, chunk_bases in zip(collected.chunks, bases, strict=True):
        for hidden, old, base in zip(chunk.hidden[1], chunk.old[1], chunk_bases, strict=True):
            now = log_probs(chunk.tokens, hidden, chunk.cond)
            for row in range(len(chunk.tokens)):
                places = hidden[row].nonzero().flatten()
                o = chunk.tokens[row, places]
                p, q = now[row, places, o], base[row, places, o]
                each, _ = clipped_surrogate(p, old[row, places], chunk.advantages[row].expand(len(o)), 0.05)
                k3 = (q - p).exp() - 1 - (q - p)
                exact = (now[row, places].exp() * (now[row, places] - base[row, places])).sum(-1)
                each = each + 0.3 * (exact if kl == "exact" else k3)
                total = total + each.sum() / (2 * len(o) if not coupled else TOKENS) / 8
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loss.total, total.detach().float())


@pytest.mark.parametrize("part", [0, 2])
def test_micro_batches_and_the_loss_scale_change_nothing_but_the_scale(part):
    results = []
    for micro_batch, scale in ((None, 1.0), (3, 64.0)):
        model = Bound()
        tools = tools_of(reference=base_of(model), scale=scale)
        built = objective(micro_batch=micro_batch, beta=0.1, masks=2, cfg_scale=2.0)
        collected = built.collect(model, batch_of(4, 3), tools)
        if part:
            move(model, 0.1)
        loss, gradient = gradients(model, built, collected, part, tools)
        results.append((loss, gradient / scale))
    (one, gradient), (other, also) = results
    torch.testing.assert_close(gradient, also)
    assert one.terms.keys() == other.terms.keys()
    for name in one.terms:
        torch.testing.assert_close(one.terms[name], other.terms[name], check_dtype=False)


class TestFlatGroups:
    def test_equal_rewards_give_no_gradient(self):
        model = Bound()
        built, tools = objective(beta=0.5), tools_of(lambda images, prompts, meta: torch.ones(len(images)))
        collected = built.collect(model, batch_of(4, 2), tools)
        loss, gradient = gradients(model, built, collected, 1, tools)
        assert not gradient.any() and loss.total == 0 and loss.terms["flat_prompts"] == 1

    def test_are_left_out_of_a_batch_and_of_its_forward_passes(self):
        def half(images, prompts, meta):
            return torch.where(torch.tensor([p == prompts[0] for p in prompts]), 0.0, images.mean((1, 2, 3)))

        model, batch = Bound(), batch_of(4, 2)
        built, tools = objective(), tools_of(half)
        collected = built.collect(model, batch, tools)
        assert collected.rows == 8 and [len(chunk.tokens) for chunk in collected.chunks] == [4]
        move(model, 0.1)
        loss, gradient = gradients(model, built, collected, 1, tools)
        assert loss.terms["flat_prompts"] == 0.5

        other = Bound()
        alone = built.collect(other, batch[4:], tools_of())
        move(other, 0.1)
        _, expected = gradients(other, built, alone, 1, tools_of())
        torch.testing.assert_close(2 * gradient, expected)


def test_two_processes_do_what_one_does():
    """Each draws its groups; rewards are compared over all, and the mean of their gradients is that of one."""
    whole = Bound()
    built = objective(masks=2)
    collected = built.collect(whole, batch_of(4, 2), tools_of())
    move(whole, 0.1)
    loss, expected = gradients(whole, built, collected, 1, tools_of())

    told: list[list[torch.Tensor]] = [[], []]

    def run(rank, gather):
        model = Bound()
        tools = tools_of(rank=rank, world=2, gather=gather)
        collected = built.collect(model, batch_of(4, 1, rank=rank, world=2), tools)
        move(model, 0.1)
        return gradients(model, built, collected, 1, tools)

    for rank in range(2):
        run(rank, lambda value, to=told[rank]: to.append(value) or torch.cat([value, value]))
    parts = []
    for rank in range(2):
        joined = iter([torch.cat(pair) for pair in zip(*told, strict=True)])
        parts.append(run(rank, lambda value, joined=joined: next(joined)))
    torch.testing.assert_close((parts[0][1] + parts[1][1]) / 2, expected)
    torch.testing.assert_close((parts[0][0].total + parts[1][0].total) / 2, loss.total)
    assert parts[0][0].terms["reward"] == loss.terms["reward"]


def test_rewards_see_pictures_between_0_and_1_without_a_graph():
    model, seen = Bound(), []

    def reward(images, prompts, meta):
        seen.append(images)
        return images.mean((1, 2, 3))

    built = objective(micro_batch=4)
    collected = built.collect(model, batch_of(4, 2), tools_of(reward))
    shown = torch.cat(seen)
    assert not shown.requires_grad and shown.min() >= 0 and shown.max() < 1
    tokens = torch.cat([chunk.tokens for chunk in collected.chunks])
    torch.testing.assert_close(shown[:, 0].flatten(1) * VOCABULARY, tokens.double())


class TestRefusals:
    def test_a_model_of_continuous_latents(self):
        with pytest.raises(UserError, match=r"for models that fill in masked tokens \(amused\), not for 'tiny'"):
            objective().check(SimpleNamespace(source="tiny"), SimpleNamespace(differentiable=False))

    def test_trained_text(self):
        with pytest.raises(UserError, match=r"train\.parts"):
            objective().check_text(True)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"group": 1}, "group must be a whole number from 2"),
            ({"masks": 3, "coupled": True}, "even"),
            ({"ratio_min": 1.5}, "ratio_min"),
            ({"clip": 0.0}, "clip"),
            ({"beta": -1.0}, "beta"),
            ({"updates": 0}, "updates"),
            ({"micro_batch": 0}, "micro_batch"),
        ],
    )
    def test_wrong_options(self, wrong, message):
        with pytest.raises(UserError, match=message):
            objective(**wrong)


def left_over_right(images, prompts, meta):
    return images[..., :8].mean((1, 2, 3)) - images[..., 8:].mean((1, 2, 3))


def amused_run(out, steps, **train):
    model = tiny_model("amused")
    torch.manual_seed(0)
    found = adapters.attach(
        {"transformer": model.denoiser}, "lora", targets="attention+ff", presets=model.presets(), rank=4
    )
    built = objective(group=8, updates=2, masks=2, beta=0.01, cfg_scale=1.5, micro_batch=12)
    options = {"batch_size": 16, "steps": steps, "checkpoint_every": 2, **train}
    policy_trainer(out, built, model=model, adapters=found, reward=left_over_right, **options).fit()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return found, [row for row in rows if "reward" in row]


def test_the_reward_of_a_real_architecture_rises(tmp_path):
    _, rows = amused_run(tmp_path, 30, lr=1e-2, checkpoint_every=30)
    first, last = (sum(row["reward"] for row in part) / 6 for part in (rows[:6], rows[-6:]))
    assert last > first + 2 * rows[0]["reward_std"], (first, last)
    assert rows[0]["kl"] < 1e-6 < rows[-1]["kl"]
    assert {"reward_std", "flat_prompts", "clip_fraction", "mask_ratio"} <= rows[0].keys()
    assert all(row["mask_ratio"] == 1 for row in rows[1::2])


def test_a_run_that_goes_on_ends_where_an_uninterrupted_one_does(tmp_path):
    whole, _ = amused_run(tmp_path / "whole", 4)
    amused_run(tmp_path / "cut", 2)
    cut, _ = amused_run(tmp_path / "cut", 4, resume=True)
    pairs = list(zip(whole.parameters(), cut.parameters(), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)
    assert any(one.abs().sum() > 0 for one, _ in pairs)
