"""WeLore: which matrices are of low rank and of which, that their factors are trained, and that the rest stays."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.declared import Declared, count_lora, full_rank, turn
from torch import Tensor, nn

from visiontune.adapters import attach, load
from visiontune.adapters._method import start_follows
from visiontune.adapters.welore import ranks, spectrum
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    full = full_rank(module)
    return count_lora(module, {"rank": full - min(full - 1, math.ceil(options["reduction"] * full))})


# At 0.9 one value is left to every tiny matrix, so all of them are of low rank.
CONTRACT = {"welore": Declared(_count, {"reduction": 0.9}, variants=({"reduction": 0.5},))}


def with_values(out: int, inputs: int, values: list[float], seed: int) -> Tensor:
    """A matrix of these singular values."""
    rng = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, len(values), generator=rng).double())[0] for n in (out, inputs))
    return (u * torch.tensor(values).double()) @ v.T


def net(heavy: float = 1.0) -> nn.Sequential:
    """The first and the last layer have a heavy tail, the middle one has not."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(5, 4)).double()
    with torch.no_grad():
        model[0].weight.copy_(heavy * with_values(4, 6, [4.0, 0.4, 0.04, 0.004], 0))
        model[1].weight.copy_(with_values(5, 4, [1.0, 0.9, 0.8, 0.7], 1))
        model[2].weight.copy_(with_values(4, 5, [2.0, 1.0, 0.02, 0.01], 2))
    return model


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize("heavy", [1.0, 1e4])
def test_one_threshold_finds_the_matrices_that_compress(heavy: float) -> None:
    """Normalised: 1 .1 .01 .001, 1 .9 .8 .7 and 1 .5 .01 .005; the smallest four of twelve are cut off."""
    adapters = attach(net(heavy), "welore", targets="Linear", reduction=1 / 3)
    assert {name: value.shape[1] for name, value in adapters.tensors().items() if name.endswith("up")} == {
        "0.up": 2,
        "2.up": 2,
    }
    assert adapters.parameter_count == 2 * (4 + 6) + 2 * (5 + 4)


@pytest.mark.parametrize("reduction", [0.1, 0.5, 0.83])
def test_the_reduction_is_met_over_all_matrices(reduction: float) -> None:
    layers = {str(n): nn.Linear(n, 40, bias=False).double() for n in (7, 20, 60)}
    with torch.no_grad():
        for i, layer in enumerate(layers.values()):
            layer.weight.pow_(2 * i + 1)
    spectra = {name: spectrum(layer) for name, layer in layers.items()}
    every = torch.cat(list(spectra.values()))
    cut = every.sort().values[math.ceil(reduction * len(every)) - 1]
    lost = {name: int((values <= cut).sum()) for name, values in spectra.items()}
    assert sum(lost.values()) == math.ceil(reduction * len(every))
    found = ranks(spectra, reduction)
    least = sum(lost.values()) / len(every)
    expected = {name: len(spectra[name]) - count for name, count in lost.items() if count >= least * len(spectra[name])}
    assert found == expected and 0 < len(found) < 3


def test_equal_spectra_are_all_of_low_rank_and_flat_ones_keep_every_value() -> None:
    same = torch.tensor([1.0, 0.5, 0.2]).double()
    assert ranks({"a": same, "b": same}, 0.1) == {"a": 2, "b": 2}, "ties are cut together"
    flat = torch.ones(3).double()
    assert ranks({"a": flat, "b": flat}, 0.99) == {"a": 3, "b": 3}
    assert ranks({"a": same, "b": flat}, 0.99) == {"a": 1}


def test_the_factors_are_the_best_of_their_rank_and_what_they_leave_is_under_the_threshold() -> None:
    model = net()
    adapter = attach(model, "welore", targets="Linear", reduction=1 / 3).adapters()["2"].inner
    rest = model[2].weight - adapter.up0 @ adapter.down0
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:2], torch.tensor([0.02, 0.01]).double())
    torch.testing.assert_close(rest.norm(), torch.tensor(0.0005).double().sqrt())


def test_the_change_is_that_of_the_product_and_its_gradient_that_of_the_factors() -> None:
    model, plain = net(), net()
    plain.load_state_dict(model.state_dict())
    adapters = attach(model, "welore", targets="Linear", reduction=1 / 3)
    assert torch.equal(model(X), plain(X))
    model(X).square().sum().backward()
    values = {}
    for name in ("0", "2"):
        inner = adapters.adapters()[name].inner
        values[name] = [inner.up0.clone().requires_grad_(), inner.down0.clone().requires_grad_()]
    weights = {f"{n}.weight": plain[int(n)].weight.detach() - (b @ a).detach() + b @ a for n, (b, a) in values.items()}
    torch.func.functional_call(plain, weights, X).square().sum().backward()
    for name, (b, a) in values.items():
        inner = adapters.adapters()[name].inner
        torch.testing.assert_close(inner.up.grad, b.grad)
        torch.testing.assert_close(inner.down.grad, a.grad)
    turn(adapters)
    for name, (b, a) in values.items():
        inner = adapters.adapters()[name].inner
        expected = plain[int(name)].weight + (b + inner.up) @ (a + inner.down) - b @ a
        torch.testing.assert_close(adapters.weight(name), expected)
    assert torch.equal(adapters.weight("1"), plain[1].weight)


def test_a_training_run_starts_it_too() -> None:
    """There starts of methods that look at the task are put off, which this one does not."""
    with start_follows():
        adapter = attach(net(), "welore", targets="Linear", reduction=1 / 3).adapters()["0"].inner
    torch.testing.assert_close(torch.linalg.svdvals(adapter.up0 @ adapter.down0)[:2], torch.tensor([4.0, 0.4]).double())


def test_a_convolution_is_a_matrix_and_groups_get_the_rank_that_one_of_them_needs() -> None:
    layer = nn.Conv2d(4, 6, (1, 2), groups=2, bias=False).double()
    with torch.no_grad():
        layer.weight[:3] = with_values(3, 4, [8.0, 4.0, 0.08], 0).view(3, 2, 1, 2)
        layer.weight[3:] = with_values(3, 4, [1.0, 0.1, 0.03], 1).view(3, 2, 1, 2)
    torch.testing.assert_close(spectrum(layer), torch.tensor([1.0, 0.5, 0.03]).double())
    with torch.no_grad():
        layer.weight[3:] = 0
    torch.testing.assert_close(spectrum(layer), torch.tensor([1.0, 0.5, 0.01]).double())


def test_zeros_have_no_components() -> None:
    model = net()
    with torch.no_grad():
        model[1].weight.zero_()
    adapters = attach(model, "welore", targets="Linear", reduction=0.5)
    assert {name: v.shape[1] for name, v in adapters.tensors().items() if name.endswith("up")} == {"0.up": 2, "2.up": 2}
    assert model(X).isfinite().all()
    with pytest.raises(UserError, match="are zero"):
        attach(model, "welore", targets="1", name="other")


def test_a_file_brings_its_matrices_and_ranks_to_a_rounded_base(tmp_path) -> None:
    model, twin = net(), net()
    adapters = attach(model, "welore", targets="Linear", reduction=1 / 3)
    turn(adapters)
    path = adapters.save(tmp_path / "a.safetensors")
    with torch.no_grad():
        for layer in twin:
            layer.weight.copy_(layer.weight.flip(0, 1) if layer is twin[1] else torch.eye(*layer.weight.shape))
    loaded = load(twin, path, allow_other_base=True)
    saved = adapters.tensors()
    assert loaded.tensors().keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in loaded.tensors().items())


@pytest.mark.parametrize("reduction", [0.0, 1.0, -1.0])
def test_impossible_reductions_are_refused(reduction: float) -> None:
    with pytest.raises(UserError, match="reduction"):
        attach(net(), "welore", targets="Linear", reduction=reduction)
