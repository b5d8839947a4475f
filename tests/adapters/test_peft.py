"""The bridge to PEFT: PEFT's own answers, and clear refusals. The contract suite has what every method owes."""

from __future__ import annotations

import typing

import peft
import pytest
import torch
from contracts.declared import Declared
from peft import get_peft_model
from torch import nn

from visiontune.adapters import attach, load
from visiontune.adapters.peft import Config, peft_config
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    r, (out, inputs) = options["options"]["r"], module.weight.shape
    return 2 * r * (out + inputs) if options["method"] == "LoHa" else out + r


CONTRACT = {
    "peft": Declared(
        _count, {"method": "LoHa", "options": {"r": 2}}, variants=({"method": "Vera", "options": {"r": 3}},)
    )
}

# Additive, multiplicative, with tensors that layers share, LoRA itself, and one that changes biases.
METHODS: dict[str, dict] = {
    "LoHa": {"r": 2},
    "HRA": {"r": 2},
    "FourierFT": {"n_frequency": 20},
    "Vera": {"r": 4, "d_initial": 0.5},
    "Lora": {"r": 2, "lora_alpha": 6},
    "IA3": {"feedforward_modules": []},
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 12))


@pytest.mark.parametrize("option", ["megatron_core", "megatron_config"])
def test_peft_imports_no_module_that_a_file_names(option: str) -> None:
    options = {"r": 2, "megatron_config": {"a": 1}, "megatron_core": "this"}
    with pytest.raises(UserError, match=f"options.{option} is not an option"):
        attach(net(), "peft", targets=["0"], method="Lora", options={option: options[option]})


X = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))


def moved(module: nn.Module) -> None:
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in sorted((p for p in module.parameters() if p.requires_grad), key=lambda p: tuple(p.shape)):
            p.add_(0.1 * torch.randn(p.shape, generator=rng))


@pytest.mark.parametrize("method", METHODS)
def test_the_outputs_are_those_of_peft_itself(method: str) -> None:
    mine, options = net(), METHODS[method]
    bridge = attach({"unet": mine}, "peft", targets=["0", "2"], method=method, options=options)
    theirs = get_peft_model(net(), peft_config(Config(method=method, options=options), ["0", "2"]))
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    own = [p for p in bridge.parameters() if p.requires_grad]
    assert sorted(tuple(p.shape) for p in own) == sorted(tuple(p.shape) for p in trained.values())
    moved(bridge)
    with torch.no_grad():
        for p, q in zip(trained.values(), own, strict=True):
            p.copy_(q)
    torch.testing.assert_close(mine(X), theirs(X), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mine(X), net()(X), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_brings_shared_tensors_back(method: str, tmp_path) -> None:
    one, other = net(), net()
    bridge = attach({"unet": one}, "peft", targets=["0", "2"], method=method, options=METHODS[method])
    moved(bridge)
    torch.manual_seed(5)
    load({"unet": other}, bridge.save(tmp_path / "a.safetensors"))
    assert torch.equal(one.eval()(X), other(X))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("Lora", {"r": 2, "lora_dropout": 0.5}),
        ("LoHa", {"r": 2, "rank_dropout": 0.5}),
        ("LoHa", {"r": 2, "module_dropout": 0.5}),
    ],
)
def test_dropout_is_for_training_and_for_no_weight(method: str, options: dict) -> None:
    model = net()
    bridge = attach({"unet": model}, "peft", targets=["0"], method=method, options=options)
    moved(bridge)
    torch.manual_seed(3)
    seen = [model[0](X) for _ in range(8)]
    assert any(not torch.allclose(y, seen[0], atol=1e-3) for y in seen)
    weights = [bridge.weight("unet.0") for _ in range(8)]
    assert all(torch.equal(w, weights[0]) for w in weights)
    model.eval(), bridge.eval()
    torch.testing.assert_close(
        model[0](X), torch.nn.functional.linear(X, weights[0], model[0].bias), rtol=1e-5, atol=1e-6
    )


def test_it_lies_on_top_of_other_sets() -> None:
    model = net()
    below = attach({"unet": model}, "oft", targets=["0"], name="below", block_size=4)
    above = attach({"unet": model}, "peft", targets=["0"], method="HRA", options={"r": 2})
    moved(below)
    moved(above)
    expected = torch.nn.functional.linear(X, above.weight("unet.0"), model[0].bias)
    torch.testing.assert_close(model[0](X), expected, rtol=1e-5, atol=1e-6)
    with below.disable():
        assert not torch.allclose(model[0](X), expected, atol=1e-3)


# Every start of PEFT's LoRA, by whether it moves the base's weights.
STARTS: dict[str | bool, bool] = {True: False, False: False, "gaussian": False, "eva": False, "orthogonal": False}
STARTS |= {"mica": False, "lora_ga": False, "pissa": True, "pissa_niter_4": True, "olora": True, "loftq": True}


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is")
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_start_of_pefts_moves_the_base(start: str | bool, dtype: torch.dtype, tmp_path) -> None:
    model, base = net().to(dtype), net().to(dtype)
    options = {"r": 2, "init_lora_weights": start}
    if start == "loftq":
        options["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1}
    if STARTS[start]:
        refusal = rf"with .*{start}.* moves the base's own weights \('0'\) when it starts"
        if start == "loftq" and not torch.cuda.is_available():
            refusal = "cannot put its 'Lora' on linear layers of these sizes: .*NVIDIA"  # PEFT makes it on CUDA only
        with pytest.raises(UserError, match=refusal):
            attach({"unet": model}, "peft", targets=["0", "2"], method="Lora", options=options)
    else:
        bridge = attach({"unet": model}, "peft", targets=["0", "2"], method="Lora", options=options)
        moved(bridge)
        assert not torch.equal(model(X.to(dtype)), base(X.to(dtype)))
        with bridge.disable():
            assert torch.equal(model(X.to(dtype)), base(X.to(dtype)))
        other = net().to(dtype)
        load({"unet": other}, bridge.save(tmp_path / "a.safetensors"))
        assert torch.equal(other(X.to(dtype)), model.eval()(X.to(dtype)))
    for key, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_the_starts_are_all_that_peft_offers() -> None:
    """As its configuration's own annotation has them; corda needs statistics that the bridge does not collect."""
    kinds = typing.get_args(typing.get_type_hints(peft.LoraConfig)["init_lora_weights"])
    offered = {word for kind in kinds for word in typing.get_args(kind)}
    assert "pissa" in offered
    assert offered - {"pissa_niter_[number of iters]", "corda"} <= STARTS.keys()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("LoHaha", {}, "no method 'LoHaha'; did you mean 'loha'"),
        ("Lora", {"r": 2, "init_lora_weights": "corda"}, "cannot put its 'Lora' on linear layers of these sizes"),
        ("LoHa", {"rank": 2}, "adapter.options.rank is not an option of PEFT's LoHaConfig"),
        ("LoHa", {"target_modules": ["0"]}, "adapter.options.target_modules is not an option"),
        ("AdaLora", {}, "AdaLoraConfig refuses its options"),
        ("PrefixTuning", {}, "PrefixTuningConfig"),
        ("LNTuning", {}, "does not run on a plain linear layer"),
        ("Lily", {}, "more than another weight and bias"),
        ("Miss", {"r": 64}, "cannot put its 'Miss' on linear layers of these sizes"),
    ],
)
def test_what_it_cannot_hold_is_refused_in_one_line(method: str, options: dict, message: str) -> None:
    model = net()
    with pytest.raises(UserError) as caught:
        attach({"unet": model}, "peft", targets=["0"], method=method, options=options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert type(model[0]) is nn.Linear
