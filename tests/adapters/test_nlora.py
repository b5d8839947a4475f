"""NLoRA: what it starts from, that the sum of differences is the paper's change, and what is trained and saved."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from contracts.declared import Declared, count_lora, full_rank
from torch import Tensor, nn

from visiontune.adapters import attach, load
from visiontune.adapters.nlora import choose, pivots
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    r = min(options["rank"], full_rank(module))
    core = getattr(module, "groups", 1) * r * r
    return core if options.get("train") == "core" else core + count_lora(module, {"rank": r})


CONTRACT = {
    "nlora": Declared(_count, {"rank": 2, "alpha": 3.0}, variants=({"rank": 3, "train": "core", "minor": "leading"},))
}


def of_rank(rank: int, out: int, inputs: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, dtype=torch.float64, generator=rng) for shape in ((out, rank), (rank, inputs)))
    return left @ right


def adapted(layer: nn.Module, **options):
    net = nn.ModuleDict({"layer": layer.double()})
    adapters = attach(net, "nlora", targets="layer", **options)
    return net, adapters, adapters.adapters()["layer"]


def started(adapter) -> Tensor:
    """B_0 N_0 A_0, as [groups, out, in x kernel]."""
    groups, r = adapter.groups, adapter.core_0.shape[1]
    return adapter.up_0.view(groups, -1, r) @ adapter.core_0 @ adapter.down_0.reshape(groups, r, -1)


def disturb(adapters, std: float = 0.1) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(std * torch.randn(p.shape, generator=rng))


@pytest.mark.parametrize("minor", ["pivoted", "leading"])
@pytest.mark.parametrize("rank", [3, 5])
def test_the_start_is_the_weight_where_its_rank_allows(minor: str, rank: int) -> None:
    layer = nn.Linear(9, 7).double()
    layer.weight.data = of_rank(3, 7, 9)
    _, _, adapter = adapted(layer, rank=rank, minor=minor)
    torch.testing.assert_close(started(adapter)[0], layer.weight.detach(), rtol=1e-9, atol=1e-9)
    assert adapter.core_0.abs().max() < 1e3, "a singular value of the minor that is rounding is not inverted"


def test_the_start_agrees_with_the_weight_on_its_rows_and_columns() -> None:
    layer = nn.Conv2d(8, 6, 3, groups=2)
    _, _, adapter = adapted(layer, rank=2)
    weight, start = layer.weight.detach().view(2, 3, -1), started(adapter)
    for g in range(2):
        rows, columns = adapter.rows[g], adapter.columns[g]
        assert len(set(rows.tolist())) == len(set(columns.tolist())) == 2
        torch.testing.assert_close(start[g][rows], weight[g][rows])
        torch.testing.assert_close(start[g][:, columns], weight[g][:, columns])
    assert not torch.equal(adapter.columns[0], adapter.columns[1])


def test_pivots_are_those_of_a_pivoted_qr() -> None:
    w = of_rank(8, 12, 8)
    w[5] = 3 * w[2]  # never both
    chosen = pivots(w, 8)
    assert chosen.tolist() == scipy.linalg.qr(w.T.numpy(), pivoting=True, mode="r")[1][:8].tolist()
    assert not {2, 5} <= set(chosen.tolist())


def test_leading_rows_that_coincide_stay_finite_and_pivots_avoid_them() -> None:
    layer = nn.Linear(6, 6)
    with torch.no_grad():
        layer.weight[1] = layer.weight[0] * (1 + 1e-9)
    sizes = []
    for minor in ("leading", "pivoted"):
        _, adapters, adapter = adapted(layer, rank=2, minor=minor)
        adapters.detach()
        i, j = adapter.rows[0], adapter.columns[0]
        sizes.append(float(torch.linalg.cond(layer.weight.detach()[i][:, j])))
        assert adapter.core_0.abs().max() < 1e3
    assert sizes[0] > 1e6 and sizes[1] < 1e3


@pytest.mark.parametrize(("options", "s"), [({}, 1.0), ({"alpha": 6.0}, 2.0)])
def test_the_change_is_the_difference_of_both_products(options: dict, s: float) -> None:
    _, adapters, a = adapted(nn.Linear(7, 5), rank=3, **options)
    disturb(adapters)
    now = (a.up_0 + a.up) @ (a.core_0 + a.core)[0] @ (a.down_0 + a.down)
    expected = s * (now - started(a)[0])
    weight, base = adapters.weight("layer"), a.layer[0].weight
    torch.testing.assert_close(weight - base, expected)
    adapters.scale = 0.25
    torch.testing.assert_close(adapters.weight("layer") - base, 0.25 * expected)
    down, up = adapters.low_rank("layer")
    assert down.shape == (6, 7)
    torch.testing.assert_close(up @ down, 0.25 * expected)


def test_the_core_alone_moves_between_frozen_factors() -> None:
    _, adapters, a = adapted(nn.Linear(7, 5), rank=3, train="core", alpha=6.0)
    assert [p.shape for p in adapters.parameters()] == [(1, 3, 3)]
    assert set(a.tensors()) == {"core", "rows", "columns"}
    disturb(adapters)
    w = a.layer[0].weight
    expected = 2.0 * w[:, a.columns[0]] @ a.core[0] @ w[a.rows[0]]
    torch.testing.assert_close(adapters.weight("layer") - w, expected)


@pytest.mark.parametrize("train", ["all", "core"])
def test_all_that_is_trained_gets_a_gradient_at_the_start(train: str) -> None:
    net, adapters, _ = adapted(nn.Linear(7, 5), rank=3, train=train)
    net["layer"](of_rank(4, 4, 7)).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in adapters.parameters())


def test_a_rounded_base_starts_from_the_saved_rows(tmp_path) -> None:
    def rows(dtype: torch.dtype) -> nn.ModuleDict:
        layer = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0001, 0.5]]))
        return nn.ModuleDict({"layer": layer.to(dtype)})

    net, half = rows(torch.float32), rows(torch.float16)
    assert attach(rows(torch.float16), "nlora", targets="layer", rank=1).adapters()["layer"].rows.item() == 0
    adapters = attach(net, "nlora", targets="layer", rank=1)
    assert adapters.adapters()["layer"].rows.item() == 1
    disturb(adapters)
    loaded = load(half, adapters.save(tmp_path / "a.safetensors"))
    assert loaded.adapters()["layer"].rows.item() == 1
    torch.testing.assert_close(loaded.change("layer")[0], adapters.change("layer")[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Linear(4, 4), {"rank": 0}, "rank must be a whole number from 1"),
        (nn.Linear(4, 4), {"rcond": 1.0}, "rcond must be a number of at least 0 and below 1"),
        (nn.utils.skip_init(nn.Linear, 4, 4), {}, "the weight of 'layer' is zero"),
    ],
)
def test_what_cannot_be_is_refused(layer: nn.Module, options: dict, message: str) -> None:
    if not options:
        nn.init.zeros_(layer.weight)
    with pytest.raises(UserError, match=message):
        adapted(layer, **options)


def test_columns_are_chosen_among_the_chosen_rows() -> None:
    w = torch.tensor([[0.0, 3.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    assert [index.tolist() for index in choose(w, 1, "pivoted")] == [[0], [1]]  # the longest column is zero there
