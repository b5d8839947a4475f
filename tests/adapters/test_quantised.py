"""Adapters on layers whose weights are stored in few bits."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visiontune import config, models, plugin
from visiontune.adapters import attach, attached, load
from visiontune.adapters._quantised import dequantised, error_of, is_quantised
from visiontune.errors import UserError
from visiontune.estimate import measure
from visiontune.models._quantise import quantise

pytestmark = [
    pytest.mark.filterwarnings("ignore:the Neumann series"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

KINDS = ["int8", "fp8", "nf4", "bnb_int8"]
METHODS = [
    ("lora", {"rank": 2}),
    ("lora", {"rank": 2, "dora": True}),
    ("oft", {"block_size": 8}),
    ("boft", {"block_size": 8, "factors": 1}),
    ("svfit", {"rank": 4}),
    ("ssf", {}),
    ("dense", {}),
    ("sara", {"budget": 0.2, "rank_loss": 0.0}),
    ("peft", {"method": "LoHa", "options": {"r": 2}}),
]


class Net(nn.Module):
    def __init__(self, kind: str | None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64))
        self.requires_grad_(False)
        if kind == "bnb_int8":
            bnb = pytest.importorskip("bitsandbytes")
            for i in (0, 2):
                made = bnb.nn.Linear8bitLt(*self.net[i].weight.shape[::-1], has_fp16_weights=False)
                made.load_state_dict(self.net[i].state_dict())
                self.net[i] = made.to("cpu").requires_grad_(False)
        elif kind:
            pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
            quantise(self.net, kind)

    def forward(self, x):
        return self.net(x)


def _plain(quantised: Net) -> Net:
    """A model with the numbers that the codes stand for."""
    made = Net(None)
    for i in (0, 2):
        made.net[i].weight.data = dequantised(quantised.net[i]).float()
    return made


def _codes(net: Net) -> list[torch.Tensor]:
    return [getattr(net.net[i].weight, "qdata", net.net[i].weight).detach().clone() for i in (0, 2)]


def _turn(adapters, seed: int = 2) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=rng))


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_codes_stand_for(kind) -> None:
    net, base = Net(kind), Net(None)
    for i in (0, 2):
        layer, w = net.net[i], base.net[i].weight
        assert is_quantised(layer) and not is_quantised(base.net[i])
        values = dequantised(layer)
        assert values.shape == w.shape and values.is_floating_point()
        error = (values - w).abs().max()
        assert 0 < error <= error_of(layer, values) < 0.2 * float(values.abs().max())
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), F.linear(x, values, layer.bias), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_training_on_codes(kind, method, options, tmp_path) -> None:
    net = Net(kind)
    before, codes = net(X), _codes(net)
    adapters = attach(net, method, targets="Linear", **options)
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in adapters.parameters())
    # A method that needs the weight multiplies with the numbers, not by the library's kernel.
    torch.testing.assert_close(net(X), before, rtol=1e-2, atol=1e-2)
    if method in ("lora", "oft") and not options.get("dora"):
        assert torch.equal(net(X), before)

    plain = _plain(net)
    twin = attach(plain, method, targets="Linear", **options)
    if method == "sara":
        twin.fill("", adapters.tensors())
    twin.load_state_dict(adapters.state_dict())
    _turn(adapters)
    _turn(twin)
    grads = []
    for model, one in ((net, adapters), (plain, twin)):
        one.refresh()
        one.zero_grad()
        model(X).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[1].norm()
    for layer in adapters.layers:
        torch.testing.assert_close(adapters.weight(layer).float(), twin.weight(layer), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapters.change(layer)[0], twin.change(layer)[0], rtol=1e-4, atol=1e-5)

    optimizer, losses = torch.optim.AdamW(adapters.parameters(), 0.01), []
    for _ in range(5):
        loss = (net(X) - X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adapters.after_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(codes, _codes(net), strict=True))
    with pytest.raises(UserError, match=r"layer 'net\.0' is quantised"):
        adapters.merge()

    path, expected = adapters.save(tmp_path / "a.safetensors"), net.eval()(X).detach()
    fresh = Net(kind).eval()
    load(fresh, path)
    assert torch.equal(fresh(X), expected)
    copied = copy.deepcopy(net)
    torch.testing.assert_close(copied(X), expected)
    assert attached(copied)["default"] is not adapters
    adapters.detach()
    # bitsandbytes' int8 has another kernel for evaluation.
    assert torch.equal(net.train()(X), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_take_the_dtype_of_the_input(kind) -> None:
    net = Net(kind)
    adapters = attach(net, "dense", targets="net.0")
    _turn(adapters)
    expected, found = net.net[0](X), net.net[0](X.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("there", [None, *KINDS])
@pytest.mark.parametrize("here", [None, *KINDS])
def test_the_same_base_in_other_bits_is_let_pass_and_another_refused(here, there, tmp_path) -> None:
    path = attach(Net(there), "lora", targets="Linear").save(tmp_path / "a.safetensors")
    load(Net(here), path)
    with pytest.raises(UserError, match="other base weights"):
        load(Net(here, seed=1), path)


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_a_model_opens_quantised(kind) -> None:
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
    whole, model = models.load("pocket/sd"), models.load("pocket/sd", quantize=kind)
    layers = [m for m in model.denoiser.modules() if isinstance(m, nn.Linear)]
    assert layers and all(map(is_quantised, layers))
    assert not any(is_quantised(m) for m in model.pipe.text_encoder.modules() if isinstance(m, nn.Linear))
    assert (model.dtype, model.device) == (whole.dtype, whole.device)
    assert model.fingerprint("text") == whole.fingerprint("text")
    assert model.fingerprint("denoiser") != whole.fingerprint("denoiser")
    cond, x = whole.embed(["a red circle"]), torch.randn(1, whole.latent_channels, 8, 8)
    with torch.no_grad():
        a, b = (m.predict(x, torch.tensor([500]), cond) for m in (whole, model))
    assert 0 < (a - b).norm() < {"int8": 0.05, "fp8": 0.15, "nf4": 0.3}[kind] * a.norm()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the recipe of a method costs on plain weights."""
    words = ["train.batch_size=1", f"out={tmp_path_factory.mktemp('whole')}"]
    return functools.cache(lambda method: measure(config.load_run(f"personalise/{method}", words)))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("method", ["lora", "oft"])
def test_a_recipe_trains_on_codes(kind, method, whole, tmp_path) -> None:
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
    words = [f"model.quantize={kind}", "train.batch_size=1", f"out={tmp_path}"]
    run = config.load_run(f"personalise/{method}", words)
    assert run.model.quantize == kind
    cost, plain = measure(run), whole(method)
    assert cost.layers == plain.layers
    assert cost.trained == plain.trained
    assert cost.parameter_bytes < plain.parameter_bytes


def test_refusals(monkeypatch) -> None:
    with pytest.raises(UserError, match=r"model\.quantize keeps weights frozen"):
        config.load_run("personalise/lora", ["model.quantize=int8", "adapter=none", "data.root=x"])
    with pytest.raises(UserError, match=r"model\.quantize"):
        config.load_run("personalise/lora", ["model.quantize=int3", "data.root=x"])
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"model\.quantize=int8 needs torchao .*visiontune\[quant\]"):
        quantise(nn.Linear(4, 4), "int8")


def test_every_method_is_thought_of() -> None:
    assert {method for method, _ in METHODS} <= set(plugin.names("adapters"))
