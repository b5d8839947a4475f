"""The statistics that planning methods start from, against sums written out and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visiontune.adapters import attach
from visiontune.adapters._evidence import Evidence, inputs
from visiontune.errors import UserError

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 9, 8)),
    "reflect": (lambda: nn.Conv2d(2, 3, (3, 1), padding=(2, 0), padding_mode="reflect"), (2, 2, 5, 5)),
    "same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 3, 2), padding=1), (1, 2, 4, 4, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_inputs_are_what_the_weight_multiplies(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    rows, groups = inputs(layer, x), getattr(layer, "groups", 1)
    weight = layer.weight.reshape(groups, -1, rows.shape[2])
    expected = layer(x).movedim(1 if layer.weight.dim() > 2 else -1, 0)
    products = (weight @ rows.mT).flatten(0, 1)
    torch.testing.assert_close(products, (expected - layer.bias.view(-1, *[1] * (x.dim() - 1))).flatten(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.idle = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


XS = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]


def evidence(net, *names, **options):
    return Evidence(
        {n: net.get_submodule(n) for n in names}, [lambda x=x: net(x).square().mean() for x in XS], **options
    )


def test_moments():
    net = Net().double()
    found = evidence(net, "one", "two").moments()
    x = torch.cat(XS)
    torch.testing.assert_close(found["one"].second[0], x.T @ x)
    torch.testing.assert_close(found["one"].covariance()[0], torch.cov(x.T, correction=0))
    hidden = torch.tanh(net.one(x)).detach()
    torch.testing.assert_close(found["two"].second[0], hidden.T @ hidden)
    assert found["two"].count == 15
    assert not net.one._forward_pre_hooks


def test_gradients_and_squares_against_finite_differences():
    net = Net().double()
    known = evidence(net, "one")
    gradient, square = known.gradients()["one"], known.squares()["one"]
    assert net.one.weight.grad is None
    eps, entry = 1e-6, (2, 1)
    slopes = []
    for loss in known.losses:
        with torch.no_grad():
            net.one.weight[entry] += eps
            up = loss()
            net.one.weight[entry] -= 2 * eps
            down = loss()
            net.one.weight[entry] += eps
        slopes.append((up - down) / (2 * eps))
    torch.testing.assert_close(gradient[entry], sum(slopes), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(square[entry], sum(s**2 for s in slopes), rtol=1e-6, atol=1e-9)


def test_the_set_is_off_and_everything_is_left_as_it_was():
    net, plain = Net().double(), Net().double()
    adapters = attach(net, "lora", targets=["one", "two"], rank=2)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(1.0)
    known = evidence(net, "one", "two", off=adapters.disable)
    expected = evidence(plain, "one", "two").gradients()
    for name, value in known.gradients().items():
        torch.testing.assert_close(value, expected[name])
    assert adapters.enabled
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    assert all(p.grad is None for p in adapters.parameters())


def test_sums_over_processes():
    net = Net().double()
    doubled = evidence(net, "one", reduce=lambda t: 2 * t)
    once = evidence(net, "one")
    torch.testing.assert_close(doubled.moments()["one"].second, 2 * once.moments()["one"].second)
    assert doubled.moments()["one"].count == 30
    torch.testing.assert_close(doubled.gradients()["one"], 2 * once.gradients()["one"])


@pytest.mark.parametrize("statistic", ["moments", "gradients"])
def test_a_layer_without_a_part_in_the_loss_is_named(statistic):
    with pytest.raises(UserError, match="layer 'idle' takes no part in the loss"):
        getattr(evidence(Net().double(), "one", "idle"), statistic)()
