"""One-bit adapters: codebooks, the straight-through gradient, and files of a few bits a value."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.declared import Declared, count_lora
from safetensors.torch import load_file
from torch import nn

from visiontune.adapters import _bits, attach, load
from visiontune.adapters.one_bit import Quantised, codebook, straight
from visiontune.errors import UserError

CONTRACT = {
    "one_bit": Declared(
        count_lora, {"rank": 4}, variants=({"rank": 2, "bits": 4, "loss": "mse"},), straight_through=True
    )
}

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 14))


def trained(skew=True, **options):
    module = net()
    adapters = attach({"unet": module}, "one_bit", targets=["0"], **{"rank": 6, **options})
    with torch.no_grad():
        for i, p in enumerate(adapters.parameters()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            # Skewed and off centre, as no standard normal sample is.
            p.add_(0.1 * (noise.exp() - 0.3 if skew else noise))
    return module, adapters, adapters.adapters()["unet.0"]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_codebooks_are_the_best_for_a_normal_distribution(bits, loss):
    values, between = codebook(bits, loss)
    assert len(values) == 2 ** (bits - 1)
    assert (values.diff() > 0).all()
    x = torch.linspace(0, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)

    def error(v):
        edges = (v[1:] + v[:-1]) / 2
        gap = (x - v[torch.bucketize(x, edges)]).abs()
        return float(((gap if loss == "l1" else gap.square()) * density).sum() / density.sum())

    best = error(values)
    for i in range(0, len(values), max(1, len(values) // 8)):
        for step in (-0.1, 0.1):
            other = values.clone()
            other[i] += step * (values[0] if i == 0 else values[i] - values[i - 1])
            assert error(other) > best
    torch.testing.assert_close(between, (values[1:] + values[:-1]) / 2)


def test_known_levels():
    assert float(codebook(1, "l1")[0]) == pytest.approx(0.6744897501960817)
    assert float(codebook(1, "mse")[0]) == pytest.approx(math.sqrt(2 / math.pi))
    # Max's table of optimum quantisers for a normal signal, four levels.
    assert codebook(2, "mse")[0].tolist() == pytest.approx([0.4528, 1.5104], abs=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_factors_take_few_values_around_their_mean(bits):
    _, _, adapter = trained(bits=bits)
    for factor in (adapter.first, adapter.second):
        latent, value = factor.latent.detach(), factor.value().detach()
        assert len(value.unique()) <= 2**bits
        z = (latent - latent.mean()) / latent.std()
        expected = latent.mean() + latent.std() * _nearest(z, bits)
        # The statistics are rounded, which may tip an entry that is next to a boundary.
        assert ((value - expected).abs() > 1e-3 * latent.std()).float().mean() < 0.02


def _nearest(z, bits):
    half = codebook(bits, "l1")[0].float()
    levels = torch.cat([-half.flip(0), half])
    return levels[(z[..., None] - levels).abs().argmin(-1)]


def test_the_gradient_passes_straight_through():
    """dM_q = dM + (Q - z) dsigma: that of mu cancels."""
    torch.manual_seed(0)
    latent = (0.3 + 0.2 * torch.randn(2, 7, 3)).double()
    factor, g = Quantised(latent.clone(), 2, "l1"), torch.randn(2, 7, 3).double()
    factor.value().backward(g)
    mean, std = (t.detach() for t in factor.statistics())
    z, q = (latent - mean) / std, (factor.value().detach() - mean) / std
    n, unrounded = latent.numel(), (latent - latent.mean()) / latent.std()
    expected = g + (g * (q - z)).sum() * unrounded / (n - 1)
    torch.testing.assert_close(factor.latent.grad, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(factor.latent.grad, g, rtol=1e-3)


def test_straight_keeps_every_bit_of_the_rounded_value():
    x = torch.randn(1000) * 1e3
    assert torch.equal(straight(x, x.round()), x.round())


@pytest.mark.parametrize("latent", [torch.zeros(1, 2, 3), torch.tensor([[[0.0, -0.0, 0.3, 1e-9]]])])
def test_opposite_halves_round_to_opposite_values_at_zero_too(latent):
    up, down = Quantised(torch.cat([latent, -latent]), 2, "l1").value().detach()
    assert torch.equal(up, -down)
    assert torch.isfinite(up).all()
    assert (up != 0).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 33])
def test_packing_and_back(bits, count):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    packed = _bits.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(count * bits / 8)
    assert torch.equal(_bits.unpack(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_file_holds_bits_and_gives_the_same_function(bits, tmp_path):
    module, adapters, _ = trained(bits=bits)
    path = adapters.save(tmp_path / "a.safetensors")
    sizes = {key: t.numel() * t.element_size() for key, t in load_file(path).items()}
    down, up = math.ceil(6 * 24 * bits / 8), math.ceil(6 * 14 * bits / 8)
    kinds = ("down", "down_statistics", "up", "up_statistics")
    assert sizes == {f"unet.0.{kind}": size for kind, size in zip(kinds, (down, 8, up, 8), strict=True)}
    other = net()
    loaded = load({"unet": other}, path)
    assert torch.equal(other(X), module.eval()(X))
    # Again from what was loaded, and after a state dict.
    assert all(torch.equal(v, loaded.tensors()[k]) for k, v in adapters.tensors().items())
    third = net()
    attach({"unet": third}, "one_bit", targets=["0"], rank=6, bits=bits).load_state_dict(loaded.state_dict())
    assert torch.equal(third(X), other(X))


def test_training_goes_on_from_a_file(tmp_path):
    """Small moves of the latent values change little, and gradients are those of the trained set but for sigma's."""
    module, adapters, _ = trained(bits=4)
    other = net()
    loaded = load({"unet": other}, adapters.save(tmp_path / "a.safetensors")).train()
    before = other(X).detach()
    for parameter in loaded.parameters():
        parameter.data.add_(1e-7)
    loaded.refresh()
    torch.testing.assert_close(other(X), before, rtol=1e-3, atol=1e-3)
    for n in (module, other):
        n(X).square().sum().backward()
    for a, b in zip(adapters.parameters(), loaded.parameters(), strict=True):
        assert float(nn.functional.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0)) > 0.99


def test_eight_bits_are_nearly_the_latent_factors():
    module, _, adapter = trained(skew=False, bits=8)
    a, b = adapter.first.latent.detach(), adapter.second.latent.detach()
    change = sum(b[i] @ a[i, 0] for i in range(2))
    moved = module(X).detach() - nn.functional.linear(X, module[0].weight, module[0].bias)
    assert float((moved - X @ change.T).norm() / moved.norm()) < 0.02


def test_rounding_in_training_beats_rounding_afterwards():
    """A low-rank change is fitted by a LoRA that is then rounded to its signs, and by one that always was."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(256, 24, generator=rng)
    target = x @ torch.randn(24, 2, generator=rng) @ torch.randn(2, 14, generator=rng) / 5

    def fit(method):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(24, 14, bias=False))
        nn.init.zeros_(module[0].weight)
        adapters = attach(module, method, targets=["0"], rank=32)
        optimizer = torch.optim.Adam(adapters.parameters(), 2e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, 300)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (module(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        return float(loss.detach()), adapters.adapters()["0"]

    _, lora = fit("lora")
    quantised, _ = fit("one_bit")
    down, up = (Quantised(torch.stack([t, t]), 1, "l1").value()[0].detach() for t in (lora.down.data, lora.up.data))
    afterwards = float((x @ (up @ down).T - target).square().mean())
    assert quantised < 0.5 * afterwards < 0.5 * float(target.square().mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "rank must be a whole number from 2 to 16384 and divisible by 2"),
        ({"bits": 3}, "bits cannot be 3"),
        ({"loss": "l2"}, "loss cannot be 'l2'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        attach(net(), "one_bit", targets=["0"], **options)
