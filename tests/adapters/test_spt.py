"""SPT: which entries are chosen, what becomes of them in each layer, the budget, and that nothing else moves."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.declared import Declared, count_lora
from torch import Tensor, nn

from visiontune.adapters import attach, load
from visiontune.adapters._evidence import Evidence
from visiontune.errors import UserError

CONTRACT = {"spt": Declared(count_lora, {"rank": 2}, plan_options={"rank": 2, "budget": 0.3})}

NAMES = ("conv", "one", "two")


class Net(nn.Module):
    """A convolution and two linear layers, each with its own part in the output."""

    def __init__(self, parts: tuple[float, ...] = (0.01, 1.0, 1.0)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.one, self.two = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Linear(8, 12), nn.Linear(8, 6)
        self.parts = parts
        self.double()

    def forward(self, image: Tensor, x: Tensor) -> Tensor:
        values = self.conv(image).pow(3), self.one(x).pow(3), self.two(x).square()
        return torch.stack([part * value.mean() for part, value in zip(self.parts, values, strict=True)])


SIZES = {"conv": 6 * 18, "one": 8 * 12, "two": 8 * 6}
LORAS = {"conv": 6 + 18, "one": 8 + 12, "two": 8 + 6}
ENTRIES = sum(SIZES.values())


def batch(seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 5, 5, generator=rng).double(), torch.randn(4, 8, generator=rng).double()


def losses(net: Net):
    return [lambda i=i: net(*batch(i)).sum() for i in range(3)]


def prepared(net: Net, **options):
    adapters = attach(net, "spt", targets=NAMES, **{"rank": 1, **options})
    adapters.prepare(losses(net))
    return adapters


def kinds(adapters) -> dict[str, str]:
    return {name: type(slot.inner).__name__ for name, slot in adapters.adapters().items()}


def trained(adapters, net: Net, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(adapters.parameters(), 0.05, weight_decay=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        net(*batch(step)).sum().backward()
        adapters.before_step(step)
        optimizer.step()
        adapters.after_step((step + 1) / steps, optimizer)


@pytest.mark.parametrize("wanted", [1, 37, 200])
def test_without_loras_exactly_the_most_sensitive_entries_are_trained(wanted):
    net = Net()
    scores = Evidence({n: getattr(net, n) for n in NAMES}, losses(net)).squares()
    joined = torch.cat([scores[n].flatten() for n in NAMES])
    expected = (joined >= joined.sort(descending=True).values[wanted - 1]).split(list(SIZES.values()))
    before = {n: getattr(net, n).weight.detach().clone() for n in NAMES}
    adapters = prepared(net, budget=wanted / ENTRIES, lora_from=math.inf)
    assert adapters.parameter_count == wanted
    trained(adapters, net)
    for name, mask in zip(NAMES, expected, strict=True):
        assert torch.equal(adapters.weight(name).flatten() != before[name].flatten(), mask)
        assert torch.equal(getattr(net, name).weight, before[name])


@pytest.mark.parametrize("lora_from", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("wanted", [15, 30, 45, 57])
def test_the_budget_is_met_within_one_lora(wanted, lora_from):
    adapters = prepared(Net(), budget=wanted / ENTRIES, lora_from=lora_from)
    assert wanted - max(LORAS.values()) < adapters.parameter_count <= wanted


def test_a_lora_where_many_entries_are_sensitive_and_entries_elsewhere():
    net = Net()
    adapters = prepared(net, budget=30 / ENTRIES, lora_from=0.5)
    scores = Evidence({n: getattr(net, n) for n in NAMES}, losses(net)).squares()
    assert kinds(adapters) == {"conv": "NoneType", "one": "Entries", "two": "LoRA"}
    assert adapters.adapters()["two"].inner.up.shape[1] == 1
    index = adapters.adapters()["one"].inner.index
    # One threshold for all: the least of the chosen entries, of which the LoRA's layer has enough.
    level = scores["one"].flatten()[index].min()
    over = {name: int((scores[name] >= level).sum()) for name in NAMES}
    assert 0.5 * LORAS["two"] <= over["two"]
    assert 0 < over["one"] == len(index) < 0.5 * LORAS["one"]
    assert over["conv"] == 0


def test_loras_alone_where_one_entry_is_enough():
    adapters = prepared(Net(), budget=45 / ENTRIES, lora_from=0.0)
    assert set(kinds(adapters).values()) <= {"LoRA", "NoneType"}
    assert 0 < adapters.parameter_count <= 45


def test_no_lora_that_is_no_smaller_than_its_weight():
    adapters = prepared(Net(), rank=4, budget=0.9, lora_from=0.0)
    assert kinds(adapters)["two"] == "Entries"  # 4 x 14 > 48


@pytest.mark.parametrize("one", range(3))
def test_the_layer_that_the_task_depends_on_gets_the_budget_and_the_others_cost_nothing(one):
    parts = tuple(1.0 if i == one else 0.0 for i in range(3))
    net = Net(parts)
    adapters = prepared(net, budget=30 / ENTRIES)
    assert [slot.inner is not None for slot in adapters.adapters().values()] == [i == one for i in range(3)]
    plain, x = Net(parts), batch(7)
    trained(adapters, net)
    for i, name in enumerate(NAMES):
        layer, own = getattr(net, name), getattr(plain, name)
        value = x[0] if name == "conv" else x[1]
        assert torch.equal(layer(value), own(value)) == (i != one)
        if i != one:
            assert not layer(value).requires_grad
            assert adapters.weight(name) is layer.weight


@pytest.mark.parametrize("lora_from", [0.5, math.inf])
def test_the_decision_changes_nothing_and_merges(lora_from):
    net = Net()
    expected = net(*batch(9))
    adapters = prepared(net, budget=70 / ENTRIES, lora_from=lora_from)
    assert torch.equal(net(*batch(9)), expected)
    trained(adapters, net)
    moved = net(*batch(9)).detach()
    assert not torch.equal(moved, expected)
    adapters.merge()
    torch.testing.assert_close(net(*batch(9)), moved, rtol=1e-10, atol=1e-12)
    adapters.unmerge()
    with adapters.disable():
        assert torch.equal(net(*batch(9)), expected)


@pytest.mark.parametrize("parts", [(0.01, 1.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
def test_the_decision_comes_back_from_a_file(parts, tmp_path):
    net = Net(parts)
    adapters = prepared(net, budget=60 / ENTRIES, lora_from=0.5)
    trained(adapters, net)
    path = adapters.save(tmp_path / "a.safetensors")
    fresh, again = Net(parts), Net(parts)
    loaded = load(fresh, path)
    attached = attach(again, "spt", targets=NAMES, rank=1, budget=60 / ENTRIES, lora_from=0.5)
    attached.restore(path)
    assert kinds(loaded) == kinds(attached) == kinds(adapters)
    for other in (fresh, again):
        assert torch.equal(other(*batch(5)), net(*batch(5)))


def test_a_budget_for_nothing_is_refused():
    with pytest.raises(UserError, match=r"adapter\.budget pays for 0 parameters"):
        prepared(Net(), budget=1e-3)
