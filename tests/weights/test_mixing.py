"""Mixtures of adapters: their ends are the adapters, and between them weights are means, whatever the methods."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visiontune import adapters
from visiontune.weights.mixing import mixed

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
