"""CCA: what is contrasted with what, its optimum, and that prompts come to say more."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny_online import batch_of, tools_of
from tiny_tokens import TOKENS, VOCABULARY, Bound, Free, base_of, move, seeded
from torch import nn
from torch.nn.functional import logsigmoid

from visiontune.errors import UserError
from visiontune.objectives.cca import CCA, Config, build, of_other, of_right

OPTIONS = {"steps": 4, "updates": 2, "beta": 0.1, "negative_weight": 3.0, "dropout": 0.0}


def objective(**options) -> CCA:
    return build(Config(**{**OPTIONS, **options}))


def lent(model, **changed):
    return tools_of(reference=base_of(model), **changed)


def gradients(model):
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def run(model, made, tools, rows=4, part=0, prompts=("a", "b", "c", "d", "e")):
    collected = made.collect(model, batch_of(1, rows, prompts=prompts), tools)
    return collected, made.update(model, collected, part, tools)


def by_hand(model, chunk, hidden, beta, weight, prompts, others, same):
    """The loss of each row from the log-probabilities of its hidden tokens alone."""

    def log_p(prompt, row):
        seen = chunk.tokens[row].flatten().masked_fill(hidden[row], model.mask_token).view(1, 3, 3)
        said = model.logits(seen, model.embed([prompt]))[0].flatten(0, 1).log_softmax(-1)
        drawn = said[torch.arange(TOKENS), chunk.tokens[row].flatten()]
        return drawn[hidden[row]].mean() * TOKENS

    count, total = len(prompts), 0
    with base_of(model)(), torch.no_grad():
        base = [[log_p(prompt, row) for prompt in (prompts[row], others[row])] for row in range(count)]
    for row in range(count):
        ratios = [beta * (log_p(prompt, row) - base[row][i]) for i, prompt in enumerate((prompts[row], others[row]))]
        positive = -logsigmoid(ratios[0])
        negative = -logsigmoid(ratios[1]) if same[row] else -weight * logsigmoid(-ratios[1])
        total = total + (positive + negative) / max(weight, 1) / count
    return total


@pytest.mark.parametrize("size", [None, 1, 3])
def test_pictures_of_the_base_are_held_to_their_prompt_and_against_their_neighbours(size):
    model = Bound()
    move(model)
    made, tools = objective(micro_batch=size), lent(model, scale=4.0)
    collected, loss = run(model, made, tools)
    found = gradients(model) / 4
    (whole,) = objective().collect(model, batch_of(1, 4, prompts=tuple("abcde")), tools)
    hidden, dropped = made.masks(whole, 0, tools)
    assert not dropped.any() and torch.equal(torch.cat([c.tokens for c in collected]), whole.tokens)
    prompts = whole.rows.prompts
    others = [prompts[i] for i in (1, 0, 3, 2)]
    expected = by_hand(model, whole, hidden, 0.1, 3.0, prompts, others, [False] * 4)
    expected.backward()
    torch.testing.assert_close(loss.total, expected.detach().float())
    torch.testing.assert_close(found, gradients(model))


def test_each_update_has_masks_of_its_own_and_rows_without_prompts_stay_where_they_are():
    model = Bound()
    move(model)
    made, tools = objective(dropout=0.6), lent(model)
    (chunk,) = made.collect(model, batch_of(1, 8, prompts=tuple("abcdefgh")), tools)
    (hidden, dropped), (later, _) = (made.masks(chunk, part, tools) for part in range(2))
    assert not torch.equal(hidden, later) and 0 < dropped.sum() < 8
    loss = made.update(model, [chunk], 0, tools)
    found = gradients(model)
    prompts = ["" if off else p for off, p in zip(dropped.tolist(), chunk.rows.prompts, strict=True)]
    others = ["" if off else chunk.rows.prompts[i ^ 1] for i, off in enumerate(dropped.tolist())]
    expected = by_hand(model, chunk, hidden, 0.1, 3.0, prompts, others, dropped)
    expected.backward()
    torch.testing.assert_close(loss.total, expected.detach().float())
    torch.testing.assert_close(found, gradients(model))


def test_a_neighbour_with_the_same_prompt_is_never_pushed_away():
    model = Bound()
    move(model)
    (chunk,), _ = run(model, objective(), lent(model), rows=4, prompts=("a",))
    assert chunk.same.all()
    ratio = torch.tensor([0.3, -2.0])
    torch.testing.assert_close(of_other(ratio, torch.tensor([True, True]), 3.0), of_right(ratio, 3.0))


def test_an_odd_row_trades_with_the_one_before():
    model = Bound()
    (chunk,), _ = run(model, objective(), lent(model), rows=3)
    names = [chunk.rows.prompts[i] for i in (1, 0, 1)]
    torch.testing.assert_close(chunk.other.tokens, model.embed(names).tokens)
    with pytest.raises(UserError, match=r"raise train\.batch_size"):
        run(model, objective(), lent(model), rows=1)


def test_at_the_start_the_loss_is_that_of_two_coins():
    model = Bound()

    @contextmanager
    def itself():
        yield

    for weight, expected in ((3.0, 4 / 3), (0.5, 1.5), (0.0, 1.0)):
        loss = run(model, objective(negative_weight=weight), tools_of(reference=itself))[1]
        assert float(loss.total) == pytest.approx(expected * torch.tensor(2.0).log().item())
        assert loss.terms["right"] == loss.terms["other"] == 0


def test_the_optimum_is_the_ratio_of_guidance():
    """Over pictures and prompts of a table, beta R is log p(x | c) / (lambda p(x)) at each of them."""
    rng = torch.Generator().manual_seed(0)
    p = torch.rand(4, 4, generator=rng, dtype=torch.float64)
    joint = p / p.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    ratio, weight, never = (
        nn.Parameter(torch.zeros(4, 4, dtype=torch.float64)),
        3.0,
        torch.zeros(4, 4, dtype=torch.bool),
    )
    optimiser = torch.optim.LBFGS([ratio], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = (joint * of_right(ratio, weight) + apart * of_other(ratio, never, weight)).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(ratio.detach(), (joint / (weight * apart)).log(), rtol=1e-4, atol=1e-4)


def test_what_does_not_suit_is_refused():
    with pytest.raises(UserError, match=r"fill in masked tokens \(amused\), not for 'tiny'"):
        objective().check(SimpleNamespace(source="tiny"), None)
    assert json.loads(objective().facts()["distilled_guidance"]) == {"cca": {"beta": 0.1, "negative_weight": 3.0}}


class Told(Free):
    """Tokens that a prompt makes more or less likely."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(3 * torch.randn(TOKENS, VOCABULARY, generator=seeded(1), dtype=torch.float64))

    def shown(self, tokens, cond):
        return self.table + (cond.tokens - 0.8) * self.slope


def test_a_prompt_comes_to_say_more_than_it_did():
    """As guidance does, which multiplies what the prompt adds."""
    model = Told()
    before = model.slope.detach().clone()
    now = before.clone()

    @contextmanager
    def untrained():
        now.copy_(model.slope.detach())
        model.slope.data.copy_(before)
        yield
        model.slope.data.copy_(now)

    made, optimiser, margins = objective(negative_weight=1.0), torch.optim.Adam([model.slope], lr=0.05), []
    for step in range(40):
        tools = tools_of(reference=untrained, index=step)
        _, loss = run(model, made, tools, rows=16, prompts=("!", "~"))
        optimiser.step()
        optimiser.zero_grad()
        margins.append(float(loss.terms["right"] - loss.terms["other"]))
    assert margins[0] == 0 and sum(margins[-10:]) / 10 > 0.2
    assert float((model.slope.detach() * before).sum() / before.square().sum()) > 1.2
