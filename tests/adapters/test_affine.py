"""SSF and BitFit: scales, shifts and biases, on layers with and without a bias."""

from __future__ import annotations

import pytest
import torch
from contracts.declared import Declared
from torch import nn

from visiontune.adapters import attach
from visiontune.errors import UserError

CONTRACT = {
    "ssf": Declared(lambda module, options: 2 * module.weight.shape[0]),
    "bitfit": Declared(
        lambda module, options: module.weight.shape[0], {"create": True}, export_options={"create": False}
    ),
}


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 4), torch.randn(2, 3, 6)),
        (nn.Linear(6, 4, bias=False), torch.randn(40, 6)),
        (nn.Conv2d(6, 4, 3, padding=1), torch.randn(2, 6, 5, 5)),
        (nn.GroupNorm(2, 6), torch.randn(2, 6, 4, 4)),
        (nn.LayerNorm(6), torch.randn(2, 3, 6)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_ssf_scales_and_shifts_the_output_channels(layer: nn.Module, x: torch.Tensor) -> None:
    y = layer(x).detach()
    net = nn.ModuleDict({"layer": layer})
    adapters = attach(net, "ssf", targets="layer")
    gain, shift = adapters.parameters()
    with torch.no_grad():
        gain.copy_(torch.linspace(-0.5, 0.5, len(gain)))
        shift.copy_(torch.linspace(1, 2, len(shift)))
    channels = 1 if y.dim() == 4 else -1
    shape = [1] * y.dim()
    shape[channels] = -1
    expected = y * (1 + gain.view(shape)) + shift.view(shape)
    torch.testing.assert_close(layer(x), expected)
    adapters.merge()
    torch.testing.assert_close(layer(x), expected.detach())


def test_two_ssf_fold_into_each_other() -> None:
    net = nn.ModuleDict({"layer": nn.Linear(6, 4)})
    lower = attach(net, "ssf", targets="layer", name="lower", noise=0.3)
    upper = attach(net, "ssf", targets="layer", name="upper", noise=0.3)
    x = torch.randn(3, 6)
    both = net["layer"](x).detach()
    lower.merge()
    upper.merge()
    torch.testing.assert_close(net["layer"](x), both)


def test_ssf_with_the_papers_noise_is_no_identity() -> None:
    torch.manual_seed(0)
    adapters = attach(nn.ModuleDict({"layer": nn.Linear(6, 400)}), "ssf", targets="layer", noise=0.02)
    assert all(0.018 < float(p.detach().std()) < 0.022 for p in adapters.parameters())


def test_bitfit_trains_biases_and_nothing_else() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    adapters = attach(net, "bitfit", targets=["Linear", "LayerNorm"])
    assert adapters.parameter_count == 8
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(1.0)
    adapters.merge()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] + (1.0 if name.endswith("bias") else 0.0))
    assert net[1].bias is None
    adapters.unmerge()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_bitfit_says_what_to_do_where_no_bias_exists() -> None:
    net = nn.ModuleDict({"layer": nn.Linear(6, 4, bias=False)})
    with pytest.raises(UserError, match=r"set adapter\.create=true"):
        attach(net, "bitfit", targets="layer")
    adapters = attach(net, "bitfit", targets="layer", create=True)
    adapters.detach()
    assert net["layer"].bias is None
