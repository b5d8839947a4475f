"""EVA: exact directions of the inputs, ranks by explained variance under a fixed budget, layers without rank."""

from __future__ import annotations

import pytest
import torch
from contracts.declared import Declared, count_lora
from torch import nn

from visiontune.adapters import AdapterSet, attach, load
from visiontune.adapters._evidence import Moments
from visiontune.adapters.eva import Config, allocate, directions
from visiontune.errors import UserError
from visiontune.weights.export import export


def _same_ranks(adapters: AdapterSet, unprepared: AdapterSet) -> None:
    ranks, before = ([a.rank for a in s.adapters().values()] for s in (adapters, unprepared))
    assert sum(ranks) == sum(before)
    assert ranks != before


CONTRACT = {
    "eva": Declared(
        count_lora,
        {"rank": 2, "alpha": 3.0},
        plan_options={"rank": 2},
        plan_variants=({"rank": 2, "rho": 4.0, "center": False, "whiten": True},),
        budget=_same_ranks,
    )
}


class Net(nn.Module):
    """`v` sees what `q` sees, `flat` what varies alike in all directions; `grouped` has two groups of one channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.grouped, self.flat = nn.Conv1d(2, 4, 3, padding=1, groups=2), nn.Linear(12, 12)
        self.register_buffer("white", torch.randn(200, 12))

    def forward(self, x):
        y = self.out(torch.tanh(self.q(x)) * self.v(x))
        return y + self.grouped(y.unflatten(-1, (2, 6))).mean((1, 2))[:, None] + self.flat(self.white).mean(0)


TARGETS = ["q", "v", "out", "grouped", "flat"]


def inputs(count: int = 4, seed: int = 1) -> list[torch.Tensor]:
    """Three strong directions around a mean."""
    rng = torch.Generator().manual_seed(seed)
    strong = torch.randn(3, 12, generator=rng, dtype=torch.float64)
    noise = [torch.randn(50, 12, generator=rng, dtype=torch.float64) for _ in range(count)]
    return [n[:, :3] * torch.tensor([3.0, 2.0, 1.0]) @ strong + 0.1 * n + 5.0 for n in noise]


def prepared(xs=None, **options):
    net = Net().double()
    adapters = attach({"": net}, "eva", targets=TARGETS, **{"rank": 3, **options})
    xs = inputs() if xs is None else xs
    adapters.prepare([lambda x=x: net(x).square().mean() for x in xs])
    return net, adapters, adapters.adapters()


def leading(x: torch.Tensor, r: int, center: bool) -> torch.Tensor:
    """Rows from the singular value decomposition of all inputs at once."""
    return torch.linalg.svd(x - x.mean(0) if center else x, full_matrices=False).Vh[:r]


@pytest.mark.parametrize("center", [True, False])
def test_a_spans_the_leading_directions_of_all_inputs(center):
    _, _, found = prepared(center=center, rho=1.0)
    a, expected = found["q"].down, leading(torch.cat(inputs()), 3, center)
    torch.testing.assert_close(a.T @ a, expected.T @ expected, rtol=1e-8, atol=1e-8)
    assert not found["q"].up.any()


def test_rows_are_orthonormal_or_white():
    x = torch.cat(inputs())
    _, _, found = prepared(rho=1.0)
    torch.testing.assert_close(found["q"].down @ found["q"].down.T, torch.eye(3).double())
    _, _, found = prepared(rho=1.0, whiten=True)
    covariance = torch.cov(x.T, correction=0)
    a = found["q"].down
    torch.testing.assert_close(a @ covariance @ a.T, torch.eye(3).double())


def test_more_of_the_variance_is_explained_than_by_lora():
    x = torch.cat(inputs())
    x = x - x.mean(0)
    _, _, found = prepared(rho=1.0)
    random = torch.linalg.qr(torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q.T
    assert (x @ found["q"].down.T).norm() > (x @ random.T).norm()
    assert (x @ found["q"].down.T).norm() > 0.99 * x.norm()


def test_the_same_whatever_the_batches():
    xs = inputs()
    _, _, one = prepared([torch.cat(xs)])
    _, _, many = prepared(xs)
    assert [a.rank for a in one.values()] == [a.rank for a in many.values()]
    a, b = one["q"].down, many["q"].down
    torch.testing.assert_close(a.T @ a, b.T @ b)


def test_layers_with_the_same_inputs_start_alike():
    _, _, found = prepared()
    r = min(found["q"].rank, found["v"].rank)
    assert torch.equal(found["q"].down[:r], found["v"].down[:r])


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 4.0])
def test_ranks_add_up_to_the_budget_under_the_cap(rho):
    _, _, found = prepared(rank=2, rho=rho)
    ranks = [a.rank for a in found.values()]
    assert sum(ranks) == 2 * len(TARGETS)
    assert max(ranks) <= rho * 2
    assert rho > 1 or set(ranks) == {2}


def test_no_layer_gets_more_than_its_change_can_use():
    """2 outputs of 3 inputs in each group of the convolution; the others take what it leaves."""
    _, _, found = prepared(rank=8, rho=2.0)
    assert found["grouped"].rank == 2
    assert sum(a.rank for a in found.values()) == 8 * len(TARGETS)


def test_the_greatest_shares_get_the_ranks():
    shares = {"a": torch.tensor([0.9, 0.05]), "b": torch.tensor([0.5, 0.4]), "c": torch.tensor([0.04, 0.03])}
    assert allocate(shares, 4) == {"a": 2, "b": 2, "c": 0}
    assert allocate(shares, 2) == {"a": 1, "b": 1, "c": 0}
    assert allocate(shares, 99) == {"a": 2, "b": 2, "c": 2}


def test_shares_are_those_of_the_variance_over_all_groups():
    torch.manual_seed(0)
    x = torch.randn(2, 100, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    moments = Moments(torch.zeros(2, 4, 4).double(), torch.zeros(2, 4).double())
    moments.add(x)
    rows, shares = directions(moments, 3, Config())
    assert rows.shape == (2, 3, 4)
    values = torch.stack([torch.linalg.eigvalsh(torch.cov(part.T, correction=0)).flip(0) for part in x])
    torch.testing.assert_close(shares, values.sum(0)[:3] / values.sum())


@pytest.mark.parametrize("whiten", [False, True])
def test_inputs_that_never_vary_claim_nothing(whiten):
    moments = Moments(torch.zeros(1, 4, 4).double(), torch.zeros(1, 4).double())
    moments.add(torch.ones(1, 5, 4).double() / 4)
    rows, shares = directions(moments, 2, Config(whiten=whiten))
    assert float(shares.max()) == 0 and torch.isfinite(rows).all()


def test_a_layer_without_rank_costs_nothing_and_stays_as_it_is(tmp_path):
    net, adapters, found = prepared(rank=1, rho=4.0)
    assert found["flat"].rank == 0
    assert not list(found["flat"].parameters())
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1)
    x, before = torch.randn(3, 12).double(), net.flat.weight.detach().clone()
    assert torch.equal(net.flat(x), net.flat.frozen_forward(x))
    net(inputs()[0]).sum().backward()
    assert all(p.grad is not None and p.numel() for p in adapters.parameters())
    adapters.merge()
    assert torch.equal(net.flat.weight, before)
    adapters.unmerge()
    fresh = Net().double()
    again = load({"": fresh}, adapters.save(tmp_path / "a.safetensors"))
    assert again.adapters()["flat"].rank == 0
    assert torch.equal(fresh(inputs()[0]), net(inputs()[0]))


def test_a_grouped_convolution_may_go_without_rank_too():
    torch.manual_seed(0)
    net = nn.ModuleDict({"still": nn.Conv2d(4, 6, 3, groups=2), "a": nn.Linear(6, 6)})
    adapters = attach(net, "eva", targets=["still", "a"], rank=2)
    varied, same = torch.randn(20, 6), torch.ones(2, 4, 5, 5)
    adapters.prepare([lambda: net["a"](varied).sum() + net["still"](same).sum()])
    assert [a.rank for a in adapters.adapters().values()] == [0, 4]
    assert torch.equal(net["still"](same), net["still"].frozen_forward(same))
    assert torch.equal(adapters.weight("still"), net["still"].weight)


def test_the_strength_does_not_follow_the_rank():
    net, adapters, found = prepared(alpha=6.0)
    assert len({a.rank for a in found.values()}) > 1
    for name, adapter in found.items():
        if name == "grouped" or not adapter.rank:
            continue
        with torch.no_grad():
            adapter.up.add_(0.1)
        weight = net.get_submodule(name).weight
        torch.testing.assert_close(adapters.weight(name), weight + 2.0 * adapter.up @ adapter.down)


def test_an_export_leaves_out_layers_without_rank(tmp_path):
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    adapters = attach({"unet": net}, "eva", targets=["a", "b"], rank=2)
    varied, still = torch.randn(20, 6), torch.ones(20, 6)
    adapters.prepare([lambda: net["a"](varied).sum() + net["b"](still).sum()])
    assert [a.rank for a in adapters.adapters().values()] == [4, 0]
    done = export(adapters, tmp_path / "x.safetensors", dtype=torch.float32)
    assert done.ranks == {"unet.a": 4}


def test_it_starts_better_than_lora_on_inputs_of_low_rank():
    def after(method: str) -> float:
        torch.manual_seed(0)
        net, rng = nn.Sequential(nn.Linear(32, 8)), torch.Generator().manual_seed(3)
        x = torch.randn(64, 2, generator=rng) @ torch.randn(2, 32, generator=rng)
        target = torch.randn(64, 2, generator=rng) @ torch.randn(2, 8, generator=rng)
        adapters = attach(net, method, targets=["0"], rank=2)
        if adapters.plans:
            adapters.prepare([lambda: (net(x) - target).square().mean()])
        optimizer = torch.optim.Adam(adapters.parameters(), 3e-3)
        for _ in range(50):
            optimizer.zero_grad()
            loss = (net(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert after("eva") < after("lora")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rho": 0.5}, "rho must be"), ({"batches": 0}, "batches must be"), ({"dora": True}, "dora does not go")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        attach(Net(), "eva", targets="q", **options)
