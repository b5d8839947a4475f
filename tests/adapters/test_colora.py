"""CoLoRA: contributions add up to the change of the loss, ranks follow them at a fixed budget, the base stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contracts.declared import Declared, count_lora
from torch import Tensor, nn

from visiontune.adapters import attach, load
from visiontune.adapters._evidence import Evidence
from visiontune.adapters.colora import Config, along, attributions, fine_tune
from visiontune.errors import UserError

CONTRACT = {"colora": Declared(count_lora, {"rank": 2}, plan_options={})}

NAMES = ("conv", "one", "two", "three")


class Net(nn.Module):
    """A convolution and three linear layers in a row."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.one, self.two, self.three = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 12)
        self.to(dtype)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image.to(self.one.weight.dtype)).mean((2, 3))
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(6, 2, 7, 7, generator=rng).double(), torch.randn(6, 12, generator=rng).double()


def losses(net: nn.Module, count: int = 2):
    return [lambda i=i: F.mse_loss(net(batch(i)[0]).double(), batch(i)[1]) for i in range(count)]


def known(net: nn.Module, given=None) -> Evidence:
    return Evidence({n: net.get_submodule(n) for n in NAMES}, given or losses(net))


def prepared(net: nn.Module, given=None, **options):
    options = {"rank": 3, "proxy_steps": 10, "proxy_lr": 0.02, "points": 2, **options}
    adapters = attach(net, "colora", targets=NAMES, **options)
    adapters.prepare(given or losses(net))
    return adapters


def ranks(adapters) -> dict[str, int]:
    slots = adapters.adapters()
    return {n: 0 if s.inner is None else s.inner.up.shape[1] for n, s in slots.items()}


# ---------------------------------------------------------------------------------------------------- contributions


@pytest.mark.parametrize(("points", "error"), [(50, 1e-3), (4, 0.05)])
def test_attributions_add_up_to_the_change_of_the_loss(points, error):
    net, options = Net(), {"proxy_steps": 12, "proxy_lr": 0.05}
    with torch.no_grad():
        before = float(sum(loss() for loss in losses(net)))
    parts = attributions(known(net), Config(points=points, **options))
    evidence = known(net)
    with along(evidence.layers) as (path, go):
        fine_tune(evidence, Config(**options), path, go)
        after = float(sum(loss() for loss in losses(net)).detach())
    change = float(sum(part.sum() for part in parts.values()))
    assert after < 0.8 * before
    assert abs(change - (after - before)) < error * (before - after)


def test_one_point_is_exact_for_a_square():
    layer = nn.Linear(3, 2, bias=False).double()
    x, target = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    evidence = Evidence({"0": layer}, [lambda: (layer(x) - target).square().sum()])
    start = layer.weight.detach().clone()
    with along(evidence.layers) as (path, go):
        fine_tune(evidence, Config(proxy_lr=0.1, proxy_steps=3), path, go)
        end = layer.weight.detach().clone()
    middle = 2 * ((start + end) / 2 @ x.T - target.T) @ x
    found = attributions(evidence, Config(proxy_lr=0.1, proxy_steps=3, points=1))["0"]
    torch.testing.assert_close(found, middle * (end - start))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("calls", [None, 5, 22])
def test_the_base_is_left_as_it_was_whatever_happens(dtype, calls):
    net, plain, count = Net(dtype), Net(dtype), 0

    def failing(loss):
        def call() -> Tensor:
            nonlocal count
            count += 1
            if count == calls:
                raise RuntimeError("out of memory")
            return loss()

        return call

    given = [failing(loss) for loss in losses(net)]
    if calls is None:
        prepared(net, given)
        assert count == 10 + 2 * 2
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            prepared(net, given, points=20)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not p.requires_grad
        assert p.grad is None


def test_a_coarse_base_is_still_moved():
    """Steps far below the weights' rounding add up."""
    net = Net(torch.bfloat16)
    evidence = known(net)
    with along(evidence.layers) as (path, go):
        fine_tune(evidence, Config(proxy_lr=2e-4, proxy_steps=40), path, go)
        assert all(p.dtype == torch.float32 for p in path.values())
        assert not torch.equal(net.one.weight, Net(torch.bfloat16).one.weight)
        assert float(path["one"].abs().max()) > 4e-3


# ---------------------------------------------------------------------------------------------------- ranks


def cost(net: nn.Module, name: str) -> int:
    weight = net.get_submodule(name).weight
    return weight.shape[0] + weight[0].numel()


@pytest.mark.parametrize("spread", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("min_rank", [0, 1])
def test_budgets_are_met_and_ranks_follow_contributions(spread, min_rank):
    net = Net()
    config = Config(rank=3, proxy_steps=10, proxy_lr=0.02, points=2)
    means = {n: float(part.abs().mean()) for n, part in attributions(known(net), config).items()}
    caps = {n: min(net.get_submodule(n).weight.flatten(1).shape) // 2 for n in NAMES}
    for total in ("ranks", "parameters"):
        found = ranks(adapters := prepared(Net(), spread=spread, min_rank=min_rank, total=total))
        if total == "ranks":
            assert sum(found.values()) == 3 * 4
        else:
            costs = [cost(net, n) for n in NAMES]
            assert 0 <= 3 * sum(costs) - adapters.parameter_count < max(costs)
        assert all(min_rank <= found[n] <= caps[n] for n in NAMES)
        assert len(set(found.values())) > 1
        for a in NAMES:
            for b in NAMES:
                if means[a] > means[b]:
                    assert found[a] >= min(found[b], caps[a])


@pytest.mark.parametrize("total", ["ranks", "parameters"])
def test_no_spread_gives_equal_ranks(total):
    assert set(ranks(prepared(Net(), spread=0.0, total=total)).values()) == {3}


class Twins(nn.Module):
    """Two equal layers side by side, and one without effect."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.idle = (nn.Linear(12, 12) for _ in range(3))
        self.two.load_state_dict(self.one.state_dict())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x) + 0.0 * self.idle(x)


@pytest.mark.parametrize(("rank", "min_rank", "expected"), [(2, 0, [3, 3, 0]), (3, 1, [4, 4, 1])])
def test_equal_contributions_get_equal_ranks_and_none_gets_the_floor(rank, min_rank, expected):
    net, x = Twins(), torch.randn(4, 12).double()
    adapters = attach(net, "colora", targets=["one", "two", "idle"], rank=rank, min_rank=min_rank, proxy_steps=3)
    adapters.prepare([lambda: net(x).square().mean()])
    assert list(ranks(adapters).values()) == expected


def test_the_strength_is_the_same_at_every_rank():
    for options, strength in (({"alpha": 6.0}, 2.0), ({"alpha": 6.0, "rslora": True}, 6 / 3**0.5), ({}, 1.0)):
        slots = prepared(Net(), **options).adapters().values()
        assert {slot.inner.strength for slot in slots} == {strength}
        assert len({slot.inner.rank for slot in slots}) > 1


def test_layers_of_rank_zero_are_the_base():
    net, plain = Net(), Net()
    idle = [lambda i=i: net.three(batch(i)[1].repeat(1, 2)[:, :16]).square().mean() + 0 * net(batch(i)[0]).sum()
            for i in range(2)]  # fmt: skip
    adapters = prepared(net, idle, min_rank=0)
    assert {n for n, r in ranks(adapters).items() if r} == {"three"}
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1)
    image = batch(3)[0]
    assert torch.equal(net.conv(image), plain.conv(image))
    assert not net.conv(image).requires_grad
    assert adapters.weight("conv") is net.conv.weight
    assert torch.equal(net.one(image[:, 0, 0, :1].repeat(1, 8)), plain.one(image[:, 0, 0, :1].repeat(1, 8)))
    assert not torch.equal(net(image), plain(image))
    adapters.merge()
    assert torch.equal(net.conv.weight, plain.conv.weight)


def test_a_task_of_one_layer_is_learnt_better_than_by_equal_ranks():
    """Of two layers beside each other one has to change, by a matrix of rank six, and the other is right already."""
    rng = torch.Generator().manual_seed(5)
    change = torch.randn(12, 6, generator=rng).double() @ torch.randn(6, 12, generator=rng).double() / 12
    xs = [torch.randn(32, 12, generator=rng).double() for _ in range(2)]

    def trained(spread: float) -> tuple[dict[str, int], float]:
        net, teacher = Twins(), Twins()
        with torch.no_grad():
            teacher.two.weight.add_(change)

        def loss(x: Tensor) -> Tensor:
            return F.mse_loss(net.one(x), teacher.one(x).detach()) + F.mse_loss(net.two(x), teacher.two(x).detach())

        torch.manual_seed(1)
        adapters = attach(net, "colora", targets=["one", "two"], rank=3, spread=spread, proxy_lr=1e-3, min_rank=0)
        adapters.prepare([lambda x=x: loss(x) for x in xs])
        assert adapters.parameter_count == 2 * 3 * 24
        optimizer = torch.optim.Adam(adapters.parameters(), 0.03)
        for step in range(200):
            optimizer.zero_grad()
            value = loss(xs[step % 2])
            value.backward()
            optimizer.step()
        return ranks(adapters), float(value.detach())

    equal, chosen = trained(0.0), trained(1.0)
    assert equal[0] == {"one": 3, "two": 3}
    assert chosen[0] == {"one": 0, "two": 6}
    assert chosen[1] < 0.1 * equal[1]


def test_the_ranks_come_back_from_a_file(tmp_path):
    net = Net()
    adapters = prepared(net, min_rank=0, spread=3.0)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1)
    path = adapters.save(tmp_path / "a.safetensors")
    fresh = Net()
    assert ranks(load(fresh, path)) == ranks(adapters)
    assert torch.equal(fresh(batch(4)[0]), net(batch(4)[0]))


def test_a_floor_above_the_budget_is_refused():
    with pytest.raises(UserError, match="2 for each of 4 layers costs 8, the budget is 4"):
        prepared(Net(), rank=1, min_rank=2, total="ranks")
