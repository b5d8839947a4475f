"""Natural GaLore: the projection, the inverse of the empirical Fisher, what it keeps, and how it goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_training import TinyModel, tiny_trainer
from torch import Tensor
from torch.nn import Parameter

from visiontune.errors import UserError
from visiontune.training import optim
from visiontune.training.config import TrainConfig
from visiontune.training.natural_galore import NaturalGaLore, inverse_fisher

SHAPES = {"wide": (6, 10), "tall": (9, 5), "square": (4, 4), "bias": (6,), "kernel": (4, 3, 3, 3)}


def parameters() -> dict[str, Parameter]:
    rng = torch.Generator().manual_seed(0)
    return {name: Parameter(torch.randn(shape, generator=rng).double()) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(10 + step)
    return {name: torch.randn(shape, generator=rng).double() for name, shape in SHAPES.items()}


def stepped(made: torch.optim.Optimizer, values: dict[str, Parameter], steps: range) -> None:
    for step in steps:
        for name, g in gradients(step).items():
            values[name].grad = g
        made.step()


def test_woodbury_is_the_inverse() -> None:
    rng = torch.Generator().manual_seed(0)
    rows, g = torch.randn(4, 30, generator=rng).double(), torch.randn(30, generator=rng).double()
    damping = torch.tensor(0.3, dtype=torch.float64)
    dense = damping * torch.eye(30).double() + rows.T @ rows
    torch.testing.assert_close(inverse_fisher(rows, g, damping), torch.linalg.solve(dense, g))


COMMON = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-10, "weight_decay": 0.1}


def test_without_a_rank_it_is_adamw() -> None:
    ours, theirs = parameters(), parameters()
    stepped(NaturalGaLore(ours.values(), **COMMON), ours, range(4))
    stepped(torch.optim.AdamW(theirs.values(), **COMMON), theirs, range(4))
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name])


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_at_full_rank_without_a_history_it_is_adamw_in_the_basis_of_the_first_gradient(name) -> None:
    """Rows at right angles to each other make that basis the axes, up to signs and order, which Adam does not see."""
    one = parameters()[name]
    other = Parameter(one.detach().clone())
    mine = NaturalGaLore([one], **COMMON, rank=99, scale=1.0, history=0)
    theirs = torch.optim.AdamW([other], **COMMON)
    for step in range(4):
        g = gradients(step)[name]
        if step == 0:
            short = min(g.shape)
            q = torch.linalg.qr(g.T if name == "wide" else g)[0] * torch.arange(1, short + 1)
            g = q.T if name == "wide" else q
        one.grad, other.grad = g.clone(), g.clone()
        mine.step(), theirs.step()
        torch.testing.assert_close(one, other)


def direction(history: list[Tensor], lr: float) -> Tensor:
    m = v = torch.zeros_like(history[0])
    for g in history:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    n = len(history)
    return -lr * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)


@pytest.mark.parametrize("rank", [2, 99])
@pytest.mark.parametrize("name", ["wide", "tall"])
@pytest.mark.parametrize("length", [0, 2])
def test_it_is_the_algorithm_written_out(name, length, rank) -> None:
    """Every step by dense matrices; P is taken anew after three steps, and the history with it."""
    values, lr, damping = parameters(), 0.01, 0.5
    made = NaturalGaLore(
        values.values(), lr=lr, rank=rank, update_proj_gap=3, scale=0.5, history=length, damping=damping
    )
    lows, seen, p = [], [], None
    for step in range(5):
        before = values[name].detach().clone()
        stepped(made, values, range(step, step + 1))
        g = gradients(step)[name]
        g = g.T if name == "tall" else g
        if step % 3 == 0:
            p, seen = torch.linalg.svd(g)[0][:, :rank], []
        low = p.T @ g
        seen = [*seen, low.flatten()][-length:] if length else []
        if length:
            stack = torch.stack(seen, 1)
            weight = damping * stack.square().sum(0).mean()
            dense = weight * torch.eye(len(stack)).double() + stack @ stack.T
            low = torch.linalg.solve(dense, low.flatten()).view_as(low)
        lows.append(low)
        expected = 0.5 * p @ direction(lows, lr)
        torch.testing.assert_close(values[name] - before, expected.T if name == "tall" else expected)


def test_a_fisher_that_is_damped_away_changes_nothing() -> None:
    one, other = parameters(), parameters()
    stepped(NaturalGaLore(one.values(), rank=2, history=3, damping=1e9, eps=0.0), one, range(3))
    stepped(NaturalGaLore(other.values(), rank=2, history=0, eps=0.0), other, range(3))
    # Lengths of the history differ by step, and so does lambda, which Adam's moments see.
    assert all((one[n] - other[n]).norm() < 0.01 * other[n].norm() for n in SHAPES)


def test_the_first_gradient_alone_keeps_its_direction() -> None:
    one, other = parameters(), parameters()
    stepped(NaturalGaLore(one.values(), rank=2, history=3, eps=0.0), one, range(1))
    stepped(NaturalGaLore(other.values(), rank=2, history=0, eps=0.0), other, range(1))
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name])


def test_what_it_keeps() -> None:
    values = parameters()
    made = NaturalGaLore(values.values(), rank=3, history=4)
    stepped(made, values, range(2))
    for name, (m, n) in {"wide": (6, 10), "tall": (5, 9), "square": (4, 4)}.items():
        kept = [v for key, v in made.state[values[name]].items() if key != "step"]
        assert sum(v.numel() for v in kept) == 3 * (m + 2 * n) + 4 * 3 * n
        assert all(isinstance(v, Tensor) and v.untyped_storage().nbytes() == 8 * v.numel() for v in kept)
    assert made.state[values["kernel"]].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_gradients_of_zero_do_nothing() -> None:
    p = Parameter(torch.ones(3, 4))
    made = NaturalGaLore([p], rank=2)
    p.grad = torch.zeros(3, 4)
    made.step()
    assert torch.equal(p, torch.ones(3, 4))


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_state_goes_on_bit_for_bit(at) -> None:
    options = {"rank": 2, "update_proj_gap": 4, "history": 2}
    whole, part = parameters(), parameters()
    stepped(NaturalGaLore(whole.values(), **options), whole, range(8))
    first = NaturalGaLore(part.values(), **options)
    stepped(first, part, range(at))
    again = NaturalGaLore(part.values(), **options)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    stepped(again, part, range(at, 8))
    assert all(torch.equal(whole[name], part[name]) for name in SHAPES)


def test_a_run_goes_on_as_if_uninterrupted(tmp_path) -> None:
    def run(out, steps, **options):
        matrix = {"rank": 2, "update_proj_gap": 3, "history": 2}
        trainer = tiny_trainer(
            out, model=TinyModel(), adapters=None, steps=steps, checkpoint_every=2, lr=0.01,
            optimizer="natural_galore", matrix_options=matrix, **options,
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        trainer.fit()
        return trainer, before

    whole, before = run(tmp_path / "a", 5)
    run(tmp_path / "b", 2)
    resumed, _ = run(tmp_path / "b", 5, resume=True)
    for name, p in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], p)
        assert not torch.equal(before[name], p)


def test_matrices_alone_are_projected() -> None:
    values = {name: Parameter(p.detach().float()) for name, p in parameters().items()}
    made = optim.make_optimizer(values, TrainConfig(optimizer="natural_galore"), {})
    assert [g["rank"] for g in made.param_groups] == [128, None]
    assert optim.state_package(made) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank=0: give a whole number of at least 1"),
        ({"rank": 2.5}, "rank=2.5: give a whole number"),
        ({"update_proj_gap": 0}, "update_proj_gap=0"),
        ({"history": -1}, "history=-1: give a whole number of at least 0"),
        ({"damping": 0.0}, "damping=0.0: give a number above 0"),
        ({"scale": 0}, "scale=0"),
        ({"lambda": 1.0}, "matrix_options.lambda is no option of natural_galore"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, message) -> None:
    train = TrainConfig(optimizer="natural_galore", matrix_options=given)
    with pytest.raises(UserError, match=message) as error:
        optim.make_optimizer({"w": Parameter(torch.ones(3, 4))}, train, {})
    assert "\n" not in str(error.value)
