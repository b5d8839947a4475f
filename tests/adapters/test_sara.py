"""SaRA: which entries are chosen, that nothing else changes, what is kept in memory, the rank loss, reselection."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from contracts.declared import Declared
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from visiontune.adapters import attach, load
from visiontune.adapters.sara import polar_factor, smallest
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    sizes = torch.cat([p.detach().flatten().abs() for p in module.parameters()])
    if "threshold" in options:
        return int((sizes < options["threshold"]).sum())
    return math.ceil(options["budget"] * len(sizes) - 1e-6)


CONTRACT = {"sara": Declared(_count, {"budget": 0.4}, variants=({"threshold": 0.2},))}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 32), nn.LayerNorm(32), nn.Linear(32, 16, bias=False), nn.GroupNorm(2, 16), nn.Linear(16, 8)
    ).to(dtype)


TARGETS = ["Linear", "LayerNorm", "GroupNorm"]


def chosen(model: nn.Module, theta: float) -> dict[str, Tensor]:
    return {name: p.detach().abs() < theta for name, p in model.named_parameters()}


def step(adapters, optimizer: torch.optim.Optimizer, loss: Tensor, done: float, number: int = 0) -> None:
    optimizer.zero_grad()
    loss.backward()
    adapters.before_step(number)
    optimizer.step()
    adapters.after_step(done, optimizer)


def test_one_threshold_serves_all_parameters() -> None:
    model = net()
    expected = sum(int(mask.sum()) for mask in chosen(model, 0.05).values())
    assert attach(model, "sara", targets=TARGETS, threshold=0.05).parameter_count == expected > 50


@pytest.mark.parametrize("share", [0.01, 0.2, 0.77, 1.0])
def test_a_budget_is_met_exactly(share: float) -> None:
    tensors = [torch.randn(313, generator=torch.Generator().manual_seed(i)) * 10.0**-i for i in range(4)]
    flat = torch.cat(tensors).abs()
    theta = smallest(tensors, share)
    assert int((flat < theta).sum()) == math.ceil(share * len(flat) - 1e-6)


def test_only_chosen_entries_change_even_with_weight_decay() -> None:
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = chosen(model, 0.05)
    adapters = attach(model, "sara", targets=TARGETS, threshold=0.05)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2, weight_decay=0.5)
    x = torch.randn(7, 24)
    for number in range(4):
        step(adapters, optimizer, model(x).pow(2).sum(), (number + 1) / 4, number)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the base itself is borrowed"
    adapters.merge()
    for name, p in model.named_parameters():
        assert torch.equal(p[~masks[name]], before[name][~masks[name]])
    assert (model[0].weight[masks["0.weight"]] != before["0.weight"][masks["0.weight"]]).all()


def test_training_keeps_no_copy_and_no_gradient_of_a_weight() -> None:
    model = nn.Linear(64, 48)
    adapters = attach(nn.ModuleDict({"layer": model}), "sara", targets="layer", budget=0.05)
    optimizer = torch.optim.AdamW(adapters.parameters())
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != model.weight.data_ptr():
            sizes.append(tensor.untyped_storage().nbytes() // 4)
        return tensor

    x = torch.randn(5, 64, requires_grad=True)
    with saved_tensors_hooks(pack, lambda t: t):
        loss = model(x).sum()
    step(adapters, optimizer, loss, 0.1)
    assert max(sizes) <= x.numel()
    assert model.weight.grad is None
    moments = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    assert moments == 2 * adapters.parameter_count == 2 * 156


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_sampled_and_dense_gradients_agree_with_autograd(density: float) -> None:
    layer = nn.Linear(40, 30).double()
    x = torch.randn(6, 40, dtype=torch.float64)
    weight = layer.weight.detach().clone().requires_grad_()
    nn.functional.linear(x, weight, layer.bias).pow(2).sum().backward()
    attach(nn.ModuleDict({"layer": layer}), "sara", targets="layer", budget=density, biases=False)
    entry = layer.entries[0].adapter
    assert (entry.product.pattern is not None) == (density < 0.1)
    layer(x).pow(2).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(entry.change.grad, weight.grad.take(entry.index), rtol=1e-12, atol=1e-12)


def test_a_model_that_is_copied_or_moved_keeps_its_gradient() -> None:
    """Few entries on a CPU have a CSR pattern, which torch neither copies nor multiplies with another device."""
    model = nn.ModuleDict({"layer": nn.Linear(40, 30)})
    attach(model, "sara", targets="layer", budget=0.05, biases=False)
    x = torch.randn(6, 40)
    twin = copy.deepcopy(model)
    entries = [net["layer"].entries[0].adapter for net in (model, twin)]
    for net in (model, twin):
        net["layer"](x).pow(2).sum().backward()
    assert torch.equal(entries[0].change.grad, entries[1].change.grad)
    product, index = entries[0].product, entries[0].index.to("meta")
    g, x = (torch.zeros(6, width, device="meta") for width in (30, 40))
    assert product.grad_entries(g, x, model["layer"].weight.to("meta"), index).shape == index.shape


# ---------------------------------------------------------------------------------------------------- rank loss


def test_the_polar_factor_is_the_gradient_of_the_nuclear_norm() -> None:
    matrix = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    torch.linalg.matrix_norm(matrix, "nuc").backward()
    torch.testing.assert_close(polar_factor(matrix.detach()), matrix.grad)


@pytest.mark.parametrize("shape", [(540, 520), (520, 700)])
def test_the_iteration_for_large_matrices_agrees_with_the_decomposition(shape: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(3)
    u, _ = torch.linalg.qr(torch.randn(shape[0], 520, generator=rng))
    v, _ = torch.linalg.qr(torch.randn(shape[1], 520, generator=rng))
    factor = polar_factor(u @ torch.diag(torch.linspace(0.05, 1, 520)) @ v.mT)
    assert (factor - u @ v.mT).abs().max() < 1e-3


def test_vanishing_directions_add_nothing() -> None:
    one = torch.outer(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(polar_factor(one), one / 5)
    assert not polar_factor(torch.zeros(3, 2)).any()


def test_the_rank_loss_reaches_the_trained_entries_and_lowers_the_nuclear_norm() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(24, 32)})
    adapters = attach(model, "sara", targets="layer", budget=0.6, rank_loss=0.1, biases=False)
    entry = model["layer"].entries[0].adapter

    def norm() -> Tensor:
        values = model["layer"].weight.detach().take(entry.index) + entry.change
        return torch.linalg.matrix_norm(torch.zeros(32, 24).put(entry.index, values), "nuc")

    expected = torch.autograd.grad(norm(), entry.change)[0]
    entry.change.grad = torch.zeros_like(entry.change)
    adapters.before_step(0, loss_scale=8.0)
    torch.testing.assert_close(entry.change.grad, 0.8 * expected, rtol=1e-3, atol=1e-4)
    before = float(norm().detach())
    with torch.no_grad():
        entry.change.sub_(entry.change.grad, alpha=0.05)
    assert float(norm().detach()) < before


def test_the_layer_of_the_rank_loss_depends_on_the_step_alone() -> None:
    def touched(number: int) -> list[bool]:
        model = net()
        adapters = attach(model, "sara", targets="Linear", budget=0.3, rank_loss=0.1, biases=False)
        for p in adapters.parameters():
            p.grad = torch.zeros_like(p)
        adapters.before_step(number)
        return [bool(p.grad.any()) for p in adapters.parameters()]

    runs = [touched(number) for number in range(8)]
    assert all(sum(run) == 1 for run in runs)
    assert len({tuple(run) for run in runs}) > 1
    assert runs[3] == touched(3)


# ---------------------------------------------------------------------------------------------------- progressive


def test_half_way_the_grown_entries_are_frozen_and_the_optimiser_starts_anew() -> None:
    model = net()
    adapters = attach(model, "sara", targets="Linear", threshold=0.05, rank_loss=0.05)
    optimizer = torch.optim.AdamW(adapters.parameters(), 2e-2, weight_decay=0.1)
    x = torch.randn(7, 24)
    step(adapters, optimizer, model(x).pow(2).sum(), 0.25)
    assert not any(a.frozen.any() for a in adapters.methods()[0].adapters.values())
    step(adapters, optimizer, model(x).pow(2).sum(), 0.5)
    assert not optimizer.state
    entries = list(adapters.methods()[0].adapters.values())
    for entry in entries:
        now = entry.layer[0].weight.detach().take(entry.index) + entry.change.detach()
        assert torch.equal(entry.frozen, now.abs() >= 0.05)
    shares = [float(entry.frozen.float().mean()) for entry in entries]
    assert all(0 < share < 1 for share in shares)
    kept = [entry.change.detach().clone() for entry in entries]
    step(adapters, optimizer, model(x).pow(2).sum(), 0.75)
    for entry, old in zip(entries, kept, strict=True):
        assert torch.equal(entry.change[entry.frozen], old[entry.frozen])
        assert (entry.change[~entry.frozen] != old[~entry.frozen]).float().mean() > 0.9


# ---------------------------------------------------------------------------------------------------- files


def test_a_rounded_base_gets_the_entries_that_were_trained(tmp_path) -> None:
    model = net()
    adapters = attach(model, "sara", targets="Linear", threshold=0.05)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.03)
    path = adapters.save(tmp_path / "a.safetensors")
    x = torch.randn(3, 24)
    half = net(torch.bfloat16)
    loaded = load(half, path)
    for a, b in zip(adapters.methods()[0].adapters.values(), loaded.methods()[0].adapters.values(), strict=True):
        assert torch.equal(a.index, b.index)
    torch.testing.assert_close(half(x.bfloat16()).float(), model(x), rtol=0.1, atol=0.1)


def test_a_threshold_under_every_weight_is_refused() -> None:
    with pytest.raises(UserError, match=r"no weight is smaller than adapter\.threshold=1e-12"):
        attach(net(), "sara", targets=["2"], threshold=1e-12)
