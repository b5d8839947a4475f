"""LoRA: the equation, its initialisation and its options."""

from __future__ import annotations

import copy

import pytest
import torch
from contracts.declared import Declared, count_lora
from torch import nn

from visiontune.adapters import attach, lora
from visiontune.errors import UserError

CONTRACT = {
    "lora": Declared(
        count_lora, {"rank": 2, "alpha": 3.0}, variants=({"rank": 4, "rslora": True}, {"rank": 2, "dora": True})
    )
}


def _layer(module: nn.Module, **config) -> tuple[nn.Module, torch.nn.Parameter, torch.nn.Parameter]:
    torch.manual_seed(0)
    adapters = attach(nn.ModuleDict({"layer": module.double()}), "lora", targets="layer", **config)
    parameters = {name.rpartition(".")[2]: p for name, p in adapters.named_parameters()}
    with torch.no_grad():
        for p in parameters.values():
            p.normal_()
    return adapters, parameters["down"], parameters["up"]


@pytest.mark.parametrize(
    ("options", "s"),
    [({}, 1.0), ({"alpha": 8.0}, 2.0), ({"alpha": 8.0, "rslora": True}, 4.0), ({"rslora": True}, 2.0)],
)
def test_change_is_s_b_a(options: dict, s: float) -> None:
    layer = nn.Linear(6, 5)
    adapters, a, b = _layer(layer, rank=4, **options)
    torch.testing.assert_close(adapters.weight("layer"), layer.weight + s * b @ a)
    adapters.scale = 0.25
    torch.testing.assert_close(adapters.weight("layer"), layer.weight + 0.25 * s * b @ a)


def test_each_group_of_a_convolution_has_its_own_factors() -> None:
    layer = nn.Conv2d(6, 4, 3, groups=2)
    adapters, a, b = _layer(layer, rank=2)
    change = adapters.weight("layer") - layer.weight
    assert a.shape == (4, 3, 3, 3)
    for g in range(2):
        expected = torch.einsum("or,rikl->oikl", b[2 * g : 2 * g + 2], a[2 * g : 2 * g + 2])
        torch.testing.assert_close(change[2 * g : 2 * g + 2], expected)


def test_initialisation_is_zero_on_one_side_only() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(64, 8), "e": nn.Embedding(9, 4)})
    adapters = attach(net, "lora", targets=["a", "e"])
    values = dict(adapters.named_parameters())
    linear, table = (m for m in adapters.modules() if isinstance(m, lora.LoRA))
    assert not linear.up.any()
    assert not table.down.any()
    assert linear.down.abs().max() <= 1 / 8
    assert linear.down.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    assert table.up.std().item() == pytest.approx(16**-0.5, rel=0.3)
    assert len(values) == 4


def test_padding_row_of_an_embedding_is_not_trained() -> None:
    net = nn.ModuleDict({"e": nn.Embedding(5, 4, padding_idx=2)})
    adapters = attach(net, "lora", targets="e")
    net["e"](torch.tensor([2, 3])).sum().backward()
    grad = next(p.grad for n, p in adapters.named_parameters() if n.endswith("down"))
    assert not grad[2].any()
    assert grad[3].any()


def test_dropout_acts_in_training_only_and_only_on_the_branch() -> None:
    layer = nn.Linear(64, 3)
    adapters, _, _ = _layer(layer, rank=4, dropout=0.5)
    x = torch.randn(2, 64, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    adapters.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, adapters.weight("layer"), layer.bias))
    adapters.train().scale = 0.0
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("option", "value"), [("rank", 0), ("dropout", 1.0)])
def test_impossible_options_are_refused(option: str, value: float) -> None:
    with pytest.raises(UserError, match=option):
        attach(nn.ModuleDict({"a": nn.Linear(4, 4)}), "lora", targets="a", **{option: value})


def test_dora_agrees_with_pefts() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    theirs = get_peft_model(
        nn.Sequential(copy.deepcopy(layer)), LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["0"])
    )
    own = nn.Sequential(layer)
    adapters = attach(own, "lora", targets="0", rank=3, alpha=6.0, dora=True)
    (adapter,) = adapters.methods()[0].adapters.values()
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape))
        module = theirs.base_model.model[0]
        module.lora_A["default"].weight.copy_(adapter.down)
        module.lora_B["default"].weight.copy_(adapter.up)
        magnitude = module.lora_magnitude_vector["default"].weight
        magnitude.copy_(layer.weight.norm(dim=1) + adapter.gain)
    x = torch.randn(5, 12)
    torch.testing.assert_close(own(x), theirs(x))
    own(x).pow(2).sum().backward()
    theirs(x).pow(2).sum().backward()
    torch.testing.assert_close(adapter.gain.grad, magnitude.grad)
    torch.testing.assert_close(adapter.down.grad, module.lora_A["default"].weight.grad)
