"""LQ-LoRA: the factors that a quantised base keeps are what is trained, and the start is that base."""

from __future__ import annotations

import pytest
import torch
from contracts.declared import Declared, count_lora, turn
from torch import nn

from visiontune import config
from visiontune.adapters import attach, load
from visiontune.adapters._quantised import dequantised
from visiontune.errors import UserError
from visiontune.models._quantise import keep, quantise

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CONTRACT = {"lq_lora": Declared(count_lora, {"rank": 3}, variants=({"rank": 20, "alpha": 4.0},))}

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def net(kind: str | None = None, rank: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64)).requires_grad_(False)
    if kind:
        pytest.importorskip("torchao" if kind == "int8" else "bitsandbytes")
        quantise(made, kind, rank)
    return made


def kept(rank: int = 6) -> nn.Sequential:
    """Layers in float64 that keep factors as those of codes do."""
    made = net().double()
    rng = torch.Generator().manual_seed(3)
    for i in (0, 2):
        out, inputs = made[i].weight.shape
        keep(made[i], *(torch.randn(shape, generator=rng).double() for shape in ((rank, inputs), (out, rank))))
    return made


@pytest.mark.parametrize("options", [{"rank": 6}, {"rank": 4}, {"rank": 8}, {"rank": 6, "alpha": 2.0}])
def test_it_starts_at_what_was_kept(options) -> None:
    base = kept()
    adapter = attach(base, "lq_lora", targets="0", **options).adapters()["0"]
    n = min(6, options["rank"])
    strength = options.get("alpha", options["rank"]) / options["rank"]
    lost = base[0].lost_up[:, :n] @ base[0].lost_down[:n]
    torch.testing.assert_close(strength * adapter.up0 @ adapter.down0, lost)
    assert not adapter.up.any() and not adapter.down.any()
    # What is beyond that starts as in LoRA: A random, B zero.
    assert adapter.down0[n:].abs().sum(1).bool().all() and not adapter.up0[:, n:].any()


def test_the_trained_factors_take_the_place_of_those_that_were_kept() -> None:
    """W' = Q + s B A, with Q what the codes stand for."""
    base = kept()
    adapters = attach(base, "lq_lora", targets="0", rank=6, alpha=3.0)
    turn(adapters)
    adapter = adapters.adapters()["0"]
    a, b = adapter.down0 + adapter.down, adapter.up0 + adapter.up
    expected = X.double() @ (base[0].weight + 0.5 * b @ a).T + base[0].bias
    torch.testing.assert_close(base[0](X.double()), expected)


def test_a_base_without_codes_gives_lora() -> None:
    base, x = net().double(), X.double()
    adapters = attach(base, "lq_lora", targets="0", rank=4)
    adapter = adapters.adapters()["0"]
    twin = net().double()
    lora = attach(twin, "lora", targets="0", rank=4)
    with torch.no_grad():
        lora.adapters()["0"].down.copy_(adapter.down0)
    for model in (base, twin):
        model(x).square().sum().backward()
    torch.testing.assert_close(adapter.up.grad, lora.adapters()["0"].up.grad)
    assert float(adapter.down0.abs().max()) <= 1 / 8


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("method", ["lq_lora", "lora", "oft", "dense"])
def test_training_on_codes_and_what_they_lost(kind, method, tmp_path) -> None:
    base = net(kind, 8)
    before, codes = base(X), getattr(base[0].weight, "qdata", base[0].weight).detach().clone()
    numbers = dequantised(base[0]).clone()
    options = {"oft": {"block_size": 8}, "dense": {}}.get(method, {"rank": 8})
    adapters = attach(base, method, targets="Linear", **options)
    if method != "dense":
        assert torch.equal(base(X), before)
    optimizer, losses = torch.optim.AdamW(adapters.parameters(), 0.01, weight_decay=0.0), []
    for _ in range(5):
        loss = (base(X) - X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adapters.after_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.equal(codes, getattr(base[0].weight, "qdata", base[0].weight))
    assert torch.equal(numbers, dequantised(base[0]))
    expected = nn.functional.linear(X, adapters.weight("0"), adapters.bias("0"))
    torch.testing.assert_close(base[0](X), expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(UserError, match="is quantised"):
        adapters.merge()

    path, expected = adapters.save(tmp_path / "a.safetensors"), base.eval()(X).detach()
    again = net(kind, 8).eval()
    load(again, path)
    assert torch.equal(again(X), expected)
    # The change is as right on the base in floating point as its codes are near.
    for other in (net(), net(kind)):
        load(other, path)
        assert (other(X) - expected).norm() < 0.2 * expected.norm()


def test_another_base_is_told_apart() -> None:
    path_of = attach(net("nf4", 8), "lq_lora", targets="Linear", rank=8)
    assert path_of.base.digest != attach(net("nf4"), "lq_lora", targets="Linear", rank=8).base.digest


def test_the_recipe_trains_on_codes(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    from visiontune.estimate import measure

    words = ["train.batch_size=1", f"out={tmp_path}"]
    run = config.load_run("personalise/lq_lora", words)
    assert (run.model.quantize, run.model.quantize_rank) == ("nf4", run.adapter["rank"])
    less = measure(config.load_run("personalise/lq_lora", ["model.quantize_rank=0", *words]))
    cost = measure(run)
    assert cost.trained == less.trained
    assert cost.parameter_bytes > less.parameter_bytes


@pytest.mark.parametrize(("option", "value"), [("rank", 0), ("alpha", 0.0)])
def test_impossible_options_are_refused(option, value) -> None:
    with pytest.raises(UserError, match=option):
        attach(net(), "lq_lora", targets="0", **{option: value})
