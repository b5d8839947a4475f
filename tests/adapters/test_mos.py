"""MoS: how shards are dealt out, what is shared, and that files hold pools once and need no seed."""

from __future__ import annotations

import warnings

import pytest
import torch
from contracts.declared import Declared, count_lora
from torch import Tensor, nn

from visiontune.adapters import attach, load
from visiontune.adapters._storage import read
from visiontune.adapters.mos import Config, deal
from visiontune.errors import UserError

CONTRACT = {
    "mos": Declared(
        lambda module, options: count_lora(module, {"rank": options["equivalent_rank"]}),
        {"rank": 3, "equivalent_rank": 2, "shards": 2, "alpha": 4.5},
        variants=({"rank": 4, "equivalent_rank": 1, "shards": 4, "private": 0.5},),
    )
}

X = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
NAMES = ("a", "b", "c")


def model(names: tuple[str, ...] = NAMES) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {name: nn.Linear(12, 8) for name in NAMES} | {"other": nn.Linear(8, 12)}
    return nn.ModuleDict({name: layers[name].double() for name in (*names, "other")})


def mixed(net: nn.ModuleDict | None = None, std: float = 0.3, **options):
    net = model() if net is None else net
    adapters = attach(net, "mos", targets="Linear", **{"rank": 4, "equivalent_rank": 2, "shards": 2, **options})
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(std * torch.randn(p.shape, generator=rng))
    return net, adapters


@pytest.mark.parametrize("users", [1, 3, 7])
@pytest.mark.parametrize("private", [0.0, 0.25, 0.8])
def test_private_shards_are_used_once_and_no_shard_is_idle(users: int, private: float) -> None:
    config = Config(rank=16, equivalent_rank=2, shards=4, private=private)
    hands, total = deal(config, 4, users, "")
    own = int(private * 8 + 1e-9)
    assert hands.shape == (users, 16, 4)
    assert total == users * 8
    uses = torch.bincount(hands.flatten(), minlength=total)
    assert (uses[: users * own] == 1).all()
    shared = uses[users * own :]
    assert shared.min() >= 1 and shared.max() - shared.min() <= 1
    for user, hand in enumerate(hands):
        assert set(range(user * own, (user + 1) * own)) <= set(hand.flatten().tolist())


def test_hands_differ_by_layer_side_and_seed_alone() -> None:
    config = Config(rank=8, equivalent_rank=2)
    hands = deal(config, 4, 5, "down")[0]
    assert not torch.equal(hands[0].sort().values, hands[1].sort().values)
    private = hands.view(5, -1) < 5 * 2
    assert (private.sum(1) == 2).all()
    assert len(private.unique(dim=0)) > 1, "a private shard stands anywhere"
    assert torch.equal(hands, deal(config, 4, 5, "down")[0])
    assert not torch.equal(hands, deal(config, 4, 5, "up")[0])
    assert not torch.equal(hands, deal(Config(rank=8, equivalent_rank=2, seed=1), 4, 5, "down")[0])


def test_with_as_much_rank_as_shards_nothing_is_shared() -> None:
    hands, total = deal(Config(rank=4, equivalent_rank=4), 4, 6, "")
    assert hands.flatten().sort().values.tolist() == list(range(total))


def test_the_factors_are_shards_side_by_side() -> None:
    net, adapters = mixed(alpha=8.0)
    for name in (*NAMES, "other"):
        mixture = adapters.adapters()[name]
        down = torch.stack([torch.cat([mixture.pool.down[i] for i in hand]) for hand in mixture.index_down])
        up = torch.stack([torch.cat([mixture.pool.up[i] for i in hand]) for hand in mixture.index_up]).T
        expected = 2.0 * up @ down
        torch.testing.assert_close(adapters.weight(name) - net[name].weight, expected)
        low = adapters.low_rank(name)
        assert low[0].shape[0] == 4
        torch.testing.assert_close(low[1] @ low[0], expected)


def test_each_group_of_a_convolution_has_its_own_hand() -> None:
    net = nn.ModuleDict({"conv": nn.Conv2d(8, 6, 3, groups=2).double()})
    adapters = attach(net, "mos", targets="conv", rank=4, equivalent_rank=2, shards=2)
    mixture = adapters.adapters()["conv"]
    nn.init.normal_(mixture.pool.up)
    down, up = mixture.pool.down[mixture.index_down].view(2, 4, 36), mixture.pool.up[mixture.index_up].view(2, 4, 3)
    expected = torch.einsum("gro,gri->goi", up, down)
    torch.testing.assert_close(adapters.change("conv")[0].view(2, 3, 36), expected)
    assert not torch.equal(*mixture.index_down.view(2, 4, 2).flatten(1).sort().values)


def test_layers_of_one_shape_train_the_same_pool() -> None:
    net, adapters = mixed()
    pools = {name: mixture.pool for name, mixture in adapters.adapters().items()}
    assert pools["a"] is pools["b"] is pools["c"] is not pools["other"]
    assert adapters.parameter_count == 2 * 4 * (12 + 8)
    mixture = adapters.adapters()["a"]
    assert mixture.index_down.shape == mixture.index_up.shape
    assert not torch.equal(mixture.index_down, mixture.index_up), "what is together in A is not in B"
    used: list[set[int]] = []
    for name in NAMES:
        adapters.zero_grad()
        net[name](X).square().sum().backward()
        mixture = adapters.adapters()[name]
        moved = mixture.pool.up.grad.abs().sum(1).nonzero().flatten().tolist()
        assert set(moved) == set(mixture.index_up.flatten().tolist())
        used.append(set(moved))
    assert used[0] & used[1] and used[0] != used[1]
    assert set.union(*used) == set(range(len(pools["a"].up)))


def test_a_file_holds_each_pool_once_and_needs_no_seed(tmp_path) -> None:
    net, adapters = mixed()
    for mixture in adapters.adapters().values():  # as another version might have dealt them
        for index in (mixture.index_down, mixture.index_up):
            index.copy_(index.flip(0))
    path = adapters.save(tmp_path / "a.safetensors")
    saved = read(path)[1]
    assert {key for key in saved if "pool" in key} == {f"{n}.pool_{s}" for n in ("a", "other") for s in ("down", "up")}
    twin = model()
    load(twin, path)
    for name in NAMES:
        assert torch.equal(twin[name](X), net[name](X))


def test_some_of_the_layers_can_be_loaded(tmp_path) -> None:
    net, adapters = mixed()
    path = adapters.save(tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = model(("a", "c"))
        load(part, path, strict=False)
        assert torch.equal(part["c"](X), net["c"](X))
        with pytest.raises(UserError, match="shards of 'b' with a layer that is missing here"):
            load(model(("b", "c")), path, strict=False)


def test_a_side_is_cut_into_the_most_shards_that_divide_it() -> None:
    _, adapters = mixed(nn.ModuleDict({"layer": nn.Linear(9, 7)}), shards=4)
    mixture = adapters.adapters()["layer"]
    assert [tuple(index.shape) for index in (mixture.index_down, mixture.index_up)] == [(4, 3), (4, 1)]
    assert mixture.pool.down.shape == (6, 3)


def test_it_learns_what_a_lora_learns() -> None:
    net, adapters = mixed(std=0.0)
    goals: dict[str, Tensor] = {name: torch.randn(3, 8, dtype=torch.float64) for name in NAMES}
    optimizer = torch.optim.Adam(adapters.parameters(), 0.02)
    losses = []
    for _ in range(200):
        loss = torch.stack([(net[name](X) - goal).square().mean() for name, goal in goals.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"equivalent_rank": 5}, "equivalent_rank must be at most rank"),
        ({"shards": 0}, "shards must be a whole number from 1"),
        ({"private": 1.0}, "private must be a number of at least 0 and below 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixed(**options)
