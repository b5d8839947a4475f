"""Mixtures of adapters: their ends are the adapters, and between them weights are means, whatever the methods."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visiontune import adapters
from visiontune.errors import UserError
from visiontune.weights.mixing import merged, mixed

METHODS = {"lora": {"rank": 2}, "oft": {"block_size": 2}, "ssf": {}}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def moved(net: Net, method: str, name: str, seed: int, targets: str | list[str] = "Linear"):
    made = adapters.attach({"net": net}, method, targets=targets, name=name, **METHODS[method])
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            rng = torch.Generator().manual_seed(100 * seed + number)
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    made.refresh()
    return made.eval()


def alone(method: str, seed: int, targets: str | list[str] = "Linear") -> dict[str, torch.Tensor]:
    """The weights of a model with one adapter merged."""
    net = Net()
    moved(net, method, "one", seed, targets).merge()
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mixture_is_the_model_whose_weights_are_means(method, share):
    net, x = Net(), torch.linspace(-1, 1, 12).view(2, 6)
    sets = [moved(net, method, "quality", 1), moved(net, "lora", "diversity", 2, ["first"])]
    made = mixed({"net": net}, sets, [1 - share, share])
    for one in sets:
        one.enabled = False
    one, other = alone(method, 1), alone("lora", 2, ["first"])
    expected = Net()
    expected.load_state_dict({name: (1 - share) * one[name] + share * other[name] for name in one})
    torch.testing.assert_close(net(x), expected(x), rtol=1e-5, atol=1e-6)
    made.detach()
    torch.testing.assert_close(net(x), Net()(x), rtol=0, atol=0)


def test_the_means_of_factors_are_another_model():
    net = Net()
    sets = [moved(net, "lora", name, seed) for seed, name in enumerate(("one", "two"), start=1)]
    made = mixed({"net": net}, sets, [0.5, 0.5])
    downs, ups = ([dict(one.tensors())[f"net.first.{part}"] for one in sets] for part in ("down", "up"))
    product = (sum(ups) / 2) @ (sum(downs) / 2)
    assert (made.change("net.first")[0] - product).abs().max() > 0.1 * product.abs().max()


def test_loras_stay_loras_with_the_ranks_of_all():
    net, x = Net(), torch.linspace(-1, 1, 12).view(2, 6)
    sets = [moved(net, "lora", name, seed) for seed, name in enumerate(("one", "two"), start=1)]
    changes = [one.change("net.first")[0] for one in sets]
    made = mixed({"net": net}, sets, [0.25, -0.5])
    assert made.method == "lora" and made.config.rank == 4
    torch.testing.assert_close(made.change("net.first")[0], 0.25 * changes[0] - 0.5 * changes[1])
    for one in sets:
        one.enabled = False
    expected = Net()
    expected.load_state_dict(
        {name: Net().state_dict()[name] + 0.25 * (a - Net().state_dict()[name]) - 0.5 * (b - Net().state_dict()[name])
         for name, a, b in ((n, alone("lora", 1)[n], alone("lora", 2)[n]) for n in Net().state_dict())}
    )  # fmt: skip
    torch.testing.assert_close(net(x), expected(x), rtol=1e-5, atol=1e-6)


def states(count: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in range(count):
        rng = torch.Generator().manual_seed(seed)
        found.append({"w": torch.randn(3, 4, generator=rng), "same": torch.full((2,), 1 / 3), "steps": torch.tensor(7)})
    return found


def test_merged_models_are_linear_in_the_weights_and_exact_where_they_must_be():
    base, one, two = states(3)
    for shares, expected in (((1.0, 0.0), one), ((0.0, 1.0), two), ((0.0, 0.0), base)):
        made = merged(base, [one, two], shares)
        torch.testing.assert_close(made["w"], expected["w"], rtol=1e-6, atol=1e-7)
        assert torch.equal(made["same"], base["same"]) and made["steps"] == 7
    assert torch.equal(merged(base, [one], [0.0])["w"], base["w"])
    half = merged(base, [one, two], [0.5, 0.25])["w"]
    torch.testing.assert_close(half - base["w"], 0.5 * (one["w"] - base["w"]) + 0.25 * (two["w"] - base["w"]))
    half_precise = {name: value.bfloat16() if value.is_floating_point() else value for name, value in base.items()}
    assert merged(half_precise, [one], [0.5])["w"].dtype == torch.bfloat16
    with pytest.raises(UserError, match="w has no counterpart"):
        merged(base, [{**one, "w": one["w"][:2]}], [1.0])


def pivotal(net: Net, rows: slice, name: str):
    """Single entries of the first layer, of the outputs that a loss reads, as they are after training."""
    made = adapters.attach({"net": net}, "spt", targets=["first"], name=name, budget=0.4, lora_from=1000.0)
    x = torch.linspace(-1, 2, 12).view(2, 6)
    made.prepare([lambda: net.first(x)[:, rows].square().sum()])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.linspace(0.1, 0.5, parameter.numel()))
    made.refresh()
    return made.eval()


def test_concepts_of_different_entries_are_merged_without_touching_each_other():
    net = Net()
    base = net.first.weight.detach().clone()
    sets = [pivotal(net, rows, name) for rows, name in ((slice(0, 2), "one"), (slice(2, 4), "two"))]
    changes = [one.change("net.first")[0] for one in sets]
    own = [change != 0 for change in changes]
    assert [int(places.sum()) for places in own] == [10, 10] and not (own[0] & own[1]).any()
    for one in sets:
        one.enabled = False
    mixed({"net": net}, sets, [1.0, 1.0]).merge()
    for places, change in zip(own, changes, strict=True):
        torch.testing.assert_close(net.first.weight[places], (base + change)[places])
    assert torch.equal(net.first.weight[~own[0] & ~own[1]], base[~own[0] & ~own[1]])
