"""TriAdaptLoRA: the triangles, who gains rank and how much, and that growth changes nothing by itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from contracts.declared import Declared, count_lora, full_rank
from torch import Tensor, nn

from visiontune.adapters import attach, load
from visiontune.adapters._storage import read
from visiontune.adapters.triadapt import Config
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    return count_lora(module, {"rank": min(options["max_rank"], full_rank(module))})


CONTRACT = {"triadapt": Declared(_count, {"start_rank": 2, "max_rank": 3, "budget": 2.5, "alpha": 4.5})}

NAMES = ("a", "b", "c")
X = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
OPTIONS = {"start_rank": 2, "max_rank": 6, "budget": 4, "growths": 3, "grow_from": 0.2, "grow_until": 0.6}


def adapted(layers: dict[str, nn.Module] | None = None, disturb: float = 0.0, **options):
    torch.manual_seed(0)
    net = nn.ModuleDict(layers or {name: nn.Linear(10, 8) for name in NAMES}).double()
    adapters = attach(net, "triadapt", targets=list(net), **{**OPTIONS, **options})
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(disturb * torch.randn(p.shape, generator=rng))
    return net, adapters, adapters.adapters()


def ranks(adapters) -> list[int]:
    return [int(t.rank) for t in adapters.adapters().values()]


def train(net, adapters, optimizer, step: int, steps: int) -> None:
    optimizer.zero_grad()
    torch.stack([(k + 1) * net[name](X).square().mean() for k, name in enumerate(NAMES)]).sum().backward()
    adapters.before_step(step)
    optimizer.step()
    adapters.after_step((step + 1) / steps, optimizer)


def test_the_change_is_the_product_of_two_triangles() -> None:
    net, adapters, found = adapted(disturb=1.0, alpha=12.0)
    t = found["a"]
    a, b = t.down.detach().clone(), t.up.detach().clone()
    for i in range(6):
        for j in range(10):
            a[i, j] *= j >= i and i < 2
        for j in range(8):
            b[j, i] *= i <= j and i < 2
    torch.testing.assert_close(adapters.weight("a"), net["a"].weight + 2.0 * b @ a)
    down, up = adapters.low_rank("a")
    assert (down.shape, up.shape) == ((2, 10), (8, 2))
    torch.testing.assert_close(up @ down, 2.0 * b @ a)
    net["a"](X).square().sum().backward()
    assert torch.equal(t.down.grad != 0, a != 0)
    assert torch.equal(t.up.grad != 0, b != 0)


@pytest.mark.parametrize("layer", [nn.Linear(10, 8), nn.Conv2d(8, 6, 3, groups=2)], ids=["linear", "grouped"])
def test_importance_is_the_norm_of_the_change_over_the_root_of_its_size(layer: nn.Module) -> None:
    _, adapters, found = adapted({"layer": layer}, disturb=0.5, alpha=3.0)
    change = adapters.change("layer")[0]
    assert found["layer"].importance() == pytest.approx(float(change.square().mean().sqrt()))


def test_growth_changes_no_output_and_no_strength() -> None:
    net, adapters, found = adapted(disturb=0.3)  # what is beyond the rank holds anything
    before, strength = [net[name](X) for name in NAMES], found["a"].strength
    adapters.after_step(1.0)
    assert sum(ranks(adapters)) == 12
    for name, y in zip(NAMES, before, strict=True):
        torch.testing.assert_close(net[name](X), y, rtol=1e-13, atol=1e-13)
        net[name](X).square().sum().backward()
        t, rank = found[name], int(found[name].rank)
        assert (t.up.grad[-1, :rank] != 0).all(), "what is new gets a gradient"
        assert not t.up.grad[:, rank:].any()
    assert found["a"].strength == strength


def test_the_budget_is_spent_by_equal_parts_and_never_exceeded() -> None:
    net, adapters, _ = adapted()
    optimizer = torch.optim.AdamW(adapters.parameters(), 0.01)
    totals = []
    for step in range(20):
        train(net, adapters, optimizer, step, 20)
        totals.append(sum(ranks(adapters)))
    assert totals == [6] * 3 + [8] * 4 + [10] * 4 + [12] * 9


def test_the_most_important_layers_gain_and_make_way_when_they_are_full() -> None:
    _, adapters, found = adapted(budget=5)
    with torch.no_grad():
        for name, size in zip(NAMES, (0.1, 3.0, 1.0), strict=True):
            found[name].up.fill_(size)
    adapters.after_step(0.2)
    assert ranks(adapters) == [2, 5, 2]
    adapters.after_step(0.4)
    assert ranks(adapters) == [2, 6, 4], "b is full: of the others, c alone is above their mean"
    found["a"].rank.fill_(1)
    adapters.after_step(0.45)
    assert ranks(adapters) == [1, 6, 4], "once a point"
    found["a"].rank.fill_(2)
    adapters.after_step(1.0)
    assert ranks(adapters) == [3, 6, 6]


def test_little_rank_goes_to_the_most_important_layer() -> None:
    _, adapters, found = adapted(budget=3)
    for name, value in zip(NAMES, (0.0, 2.0, 3.0), strict=True):
        found[name].importance = lambda value=value: value
    adapters.after_step(0.2)
    assert ranks(adapters) == [2, 2, 3]


def test_equal_layers_share_and_broken_ones_end_it() -> None:
    _, adapters, found = adapted(growths=1, grow_until=0.2)
    for t in found.values():
        t.importance = lambda: 0.1
    assert sum([0.1] * 3) / 3 > 0.1
    adapters.after_step(0.2)
    assert ranks(adapters) == [4, 4, 4]
    _, adapters, found = adapted()
    found["a"].up.data.fill_(math.nan)
    adapters.after_step(1.0)
    assert ranks(adapters) == [2, 2, 2]


def test_a_small_layer_is_no_place_for_the_whole_budget() -> None:
    _, adapters, found = adapted({"small": nn.Linear(10, 3), "tiny": nn.Linear(1, 8)})
    assert found["small"].limit == 3 and found["tiny"].limit == 1
    adapters.after_step(1.0)
    assert ranks(adapters) == [3, 1]


def test_new_entries_have_no_past_in_the_optimiser() -> None:
    net, adapters, found = adapted(growths=1, grow_from=0.5, grow_until=0.5)
    # Coupled weight decay moves the moments of whatever is not zero, active or not.
    optimizer = torch.optim.Adam(adapters.parameters(), 0.01, weight_decay=0.1)
    for step in range(4):
        train(net, adapters, optimizer, step, 10)
    before = {name: optimizer.state[t.down]["exp_avg"].clone() for name, t in found.items()}
    assert before["c"][2].any()
    train(net, adapters, optimizer, 4, 10)
    for t in found.values():
        rank = int(t.rank)
        for key in ("exp_avg", "exp_avg_sq"):
            down, up = optimizer.state[t.down][key], optimizer.state[t.up][key]
            assert not down[2:rank].any() and not up[:, 2:rank].any()
            assert down[:2].any(dim=1).all() and up[:, :2].any()
    assert max(ranks(adapters)) > 2


def test_each_group_grows_its_own_rows() -> None:
    net, adapters, found = adapted({"layer": nn.Conv2d(8, 6, 1, groups=2)}, disturb=0.5, max_rank=3, budget=3)
    optimizer = torch.optim.Adam(adapters.parameters(), 0.0, weight_decay=0.1)
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    net["layer"](x).square().sum().backward()
    optimizer.step()
    adapters.after_step(1.0, optimizer)
    state = optimizer.state[found["layer"].down]["exp_avg"].flatten(1)
    assert state.any(dim=1).tolist() == [True, True, False] * 2
    change = adapters.change("layer")[0].flatten(1)
    down, up = found["layer"].down.view(2, 3, 4).triu(), found["layer"].up.view(2, 3, 3).tril()
    torch.testing.assert_close(change, (up @ down).flatten(0, 1).detach())
    assert not up[..., 2].any()


def test_a_run_goes_on_and_a_file_holds_what_acts(tmp_path) -> None:
    def run(adapters, net, first: int, last: int, optimizer) -> None:
        for step in range(first, last):
            train(net, adapters, optimizer, step, 20)

    net, adapters, found = adapted(alpha=3.0)
    optimizer = torch.optim.AdamW(adapters.parameters(), 0.01)
    run(adapters, net, 0, 10, optimizer)
    other, twin, _ = adapted(alpha=3.0, disturb=1.0)
    twin.load_state_dict(adapters.state_dict())
    again = torch.optim.AdamW(twin.parameters(), 0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(adapters, net, 10, 20, optimizer)
    run(twin, other, 10, 20, again)
    assert ranks(twin) == ranks(adapters) and sum(ranks(twin)) == 12
    assert len(set(ranks(twin))) > 1
    for name in NAMES:
        assert torch.equal(net[name](X), other[name](X))
    path = adapters.save(tmp_path / "a.safetensors")
    saved: dict[str, Tensor] = read(path)[1]
    fresh = nn.ModuleDict({name: nn.Linear(10, 8).double() for name in NAMES})
    fresh.load_state_dict(net.state_dict())
    loaded = load(fresh, path)
    for name in NAMES:
        rank = int(found[name].rank)
        assert saved[f"{name}.down"].shape == (1, rank, 10) and saved[f"{name}.up"].shape == (8, rank)
        assert torch.equal(fresh[name](X), net[name](X))
    loaded.after_step(1.0)
    assert ranks(loaded) == ranks(adapters), "a budget that is spent stays spent"


def test_growths_are_spread_over_their_part_of_the_run() -> None:
    config = Config(growths=3, grow_from=0.2, grow_until=0.6)
    assert [config.due(done) for done in (0.0, 0.19, 0.2, 0.39, 0.4, 0.59, 0.6, 1.0)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [Config(growths=1, grow_from=0.5, grow_until=0.9).due(done) for done in (0.4, 0.5, 1.0)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_rank": 5}, "budget must be at least start_rank"),
        ({"budget": 7}, "max_rank at least budget"),
        ({"growths": 0}, "growths must be a whole number from 1"),
        ({"grow_from": 0.7}, "grow_from must be at most grow_until"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(**options)
