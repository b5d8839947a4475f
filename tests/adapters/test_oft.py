"""OFT: rotations stay rotations, on the parameters, on the weights and through training."""

from __future__ import annotations

import math
import warnings
from unittest import mock

import pytest
import torch
from contracts.declared import Declared
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from visiontune.adapters import AdapterSet, attach, oft
from visiontune.adapters._cayley import cayley, inverse, neumann, packed, rotations, skew
from visiontune.adapters._rotate import rotate_channels, rotate_input, rotate_weight, rotated
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    inputs = module.weight[0].numel()
    b = inputs // options["n_blocks"] if "n_blocks" in options else options["block_size"]
    d = b if options.get("block_share") else getattr(module, "groups", 1) * inputs
    return d * (b - 1) // 2 + (module.weight.shape[0] if options.get("rescale") else 0)


CONTRACT = {
    "oft": Declared(
        _count,
        {"block_size": 4},
        variants=(
            {"block_size": 4, "side": "input", "rescale": True},
            {"block_size": 4, "side": "weight", "rescale": True},
            {"block_size": 4, "keep_rotated": True},
            {"n_blocks": 2, "block_share": True},
            {"block_size": 4, "cayley": "neumann"},
            {"block_size": 4, "coft": True, "eps": 0.01},
        ),
    )
}


def _attach(module: nn.Module, std: float = 0.1, **config) -> AdapterSet:
    torch.manual_seed(0)
    adapters = attach(nn.ModuleDict({"layer": module}), "oft", targets="layer", **config)
    with torch.no_grad():
        for p in adapters.parameters():
            p.normal_(std=std)
    return adapters


def _energy(w: Tensor) -> Tensor:
    """Hyperspherical energy of the rows, summed over pairs."""
    return 1 / torch.pdist(nn.functional.normalize(w.flatten(1))).clamp_min(1e-9)


@pytest.mark.parametrize("b", [2, 8, 32, 64])
def test_exact_rotations_are_orthogonal_at_entry_std_one_tenth(b: int) -> None:
    v = 0.1 * torch.randn(20, b * (b - 1) // 2, generator=torch.Generator().manual_seed(0))
    r = rotations(v, b)
    assert oft.orthogonality_error(r) <= 1e-5
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(20))


def test_cayley_is_the_papers_sign_and_order() -> None:
    q = skew(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), 3)
    assert torch.equal(q[0], torch.tensor([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]], dtype=torch.float64))
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(cayley(q)[0][0], (identity + q[0]) @ torch.linalg.inv(identity - q[0]))
    # packed is the adjoint of skew: <skew(v), s> = <v, packed(s)>.
    s, v = torch.randn(2, 3, 3), torch.randn(2, 3)
    torch.testing.assert_close((skew(v, 3) * s).sum(), (v * packed(s)).sum())


@pytest.mark.parametrize("terms", [0, 3, 5])
def test_rotation_gradients(terms: int) -> None:
    v = 0.3 * torch.randn(3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: rotations(v, 4, 0.7, terms), v.requires_grad_())


@pytest.mark.parametrize("terms", [3, 4, 5, 7])
def test_neumann_has_the_sign_of_exact_and_its_error_order(terms: int) -> None:
    q = skew(torch.randn(4, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 8)
    q /= torch.linalg.matrix_norm(q, 2).view(-1, 1, 1)

    def error(size: float) -> float:
        return float((neumann(size * q, terms) - cayley(size * q)[0]).abs().max())

    # The first wrong term is of order terms - 1: halving Q divides the error by 2^(terms - 1).
    assert error(0.02) / error(0.01) == pytest.approx(2 ** (terms - 1), rel=0.1)
    assert error(0.1) < 3 * 0.1 ** (terms - 1)


def test_neumann_warns_once_when_it_leaves_the_rotations() -> None:
    layer = nn.Linear(32, 8)
    adapters = _attach(layer, std=0.01, cayley="neumann")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(2, 32))
    with torch.no_grad():
        next(adapters.parameters()).mul_(10)
    with pytest.warns(UserWarning, match="Neumann series left the rotations"):
        layer(torch.randn(2, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters.refresh()
        layer(torch.randn(2, 32))
        exact = nn.Linear(32, 8)
        _attach(exact)
        exact(torch.randn(2, 32))


@pytest.mark.parametrize("kind", ["linear", "conv", "depthwise_free"])
def test_norms_angles_and_energy_stay(kind: str) -> None:
    layer = {
        "linear": lambda: nn.Linear(64, 20),
        "conv": lambda: nn.Conv2d(8, 20, 3),
        "depthwise_free": lambda: nn.Conv2d(8, 20, 1),
    }[kind]()
    adapters = _attach(layer, block_size=8)
    w, turned = layer.weight.flatten(1), adapters.weight("layer").flatten(1).detach()
    assert (w - turned).norm() > 0.1 * w.norm()
    torch.testing.assert_close(turned.norm(dim=1), w.norm(dim=1))
    torch.testing.assert_close(turned @ turned.T, w @ w.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(_energy(turned).sum(), _energy(w).sum(), rtol=1e-5, atol=0)


def test_rotations_do_not_mix_groups() -> None:
    layer = nn.Conv2d(8, 6, 3, groups=2)
    adapters = _attach(layer, block_size=9)
    v = next(adapters.parameters())
    assert v.shape == (8, 36)
    before = adapters.weight("layer").detach()
    with torch.no_grad():
        v[4:] = 0
    after = adapters.weight("layer").detach()
    assert torch.equal(after[:3], before[:3])
    assert torch.equal(after[3:], layer.weight[3:])


@pytest.mark.parametrize("share", [False, True])
def test_coft_radius_after_the_step(share: bool) -> None:
    layer = nn.Linear(32, 8)
    adapters = _attach(layer, coft=True, eps=1e-3, block_size=8, block_share=share)
    v = next(adapters.parameters())
    r, radius = (1 if share else 4), 1e-3 * 64 / (1 if share else 2)
    assert oft.coft_radius(1e-3, 8, r) == pytest.approx(radius)
    with torch.no_grad():
        v[0] *= 1e-3 / v[0].norm()
    inside, outside = v[0].clone(), v[1:].clone()
    adapters.after_step()
    norms = torch.linalg.matrix_norm(skew(v.detach(), 8))
    assert torch.equal(v[0], inside)
    torch.testing.assert_close(norms[1:], torch.full_like(norms[1:], radius))
    torch.testing.assert_close(nn.functional.normalize(v[1:]), nn.functional.normalize(outside))
    before = v.detach().clone()
    adapters.after_step()
    torch.testing.assert_close(v.detach(), before)


def test_without_coft_the_step_is_left_alone() -> None:
    adapters = _attach(nn.Linear(32, 8))
    before = next(adapters.parameters()).detach().clone()
    adapters.after_step()
    assert torch.equal(next(adapters.parameters()), before)


class _Shapes(TorchDispatchMode):
    """Records the operations that make a tensor of as many entries as a shape has."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.size, self.made = math.prod(shape), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # By the number of entries: a product may be written block by block.
        if isinstance(result, Tensor) and result.numel() == self.size and not func.is_view:
            self.made.append(func.name())
        return result


@pytest.mark.parametrize("side", ["input", "weight"])
@pytest.mark.parametrize("keep", [False, True])
def test_backward_makes_nothing_of_the_weights_shape(side: str, keep: bool) -> None:
    layer = nn.Linear(24, 11)
    adapters = _attach(layer, block_size=4, side=side, keep_rotated=keep)
    x = torch.randn(7, 24, requires_grad=True)
    with _Shapes((11, 24)) as forward:
        y = layer(x).sum()
    with _Shapes((11, 24)) as backward:
        y.backward()
    assert backward.made == []
    assert bool(forward.made) == (side == "weight" or keep)
    assert x.grad is not None
    assert next(adapters.parameters()).grad is not None


def test_one_inverse_serves_all_layers_and_forwards_of_a_step() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Conv1d(4, 4, 1))
    adapters = attach(net, "oft", targets="all_of_it", presets={"all_of_it": ["Linear"]}, block_size=8)
    assert len(list(adapters.parameters())) == 1
    optimizer = torch.optim.SGD(adapters.parameters(), 0.1)
    with mock.patch("visiontune.adapters._cayley.cayley", wraps=cayley) as inverse:
        for step in range(2):
            for _ in range(3):
                y = net[1](net[0](net[1](net[0](torch.randn(2, 16)))))
                y.pow(2).sum().backward()
            with torch.no_grad():
                net[0](torch.randn(2, 16))
            assert inverse.call_count == step + 1
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_every_form_of_an_optimiser_is_noticed(options: dict) -> None:
    # Fused optimisers do not change the version of a tensor that they write to.
    layer = nn.Linear(8, 8)
    adapters = _attach(layer, block_size=4)
    optimizer = torch.optim.AdamW(adapters.parameters(), 0.05, **options)
    x = torch.randn(3, 8)
    for _ in range(2):
        layer(x).pow(2).sum().backward()
        optimizer.step()
        expected = nn.functional.linear(x, _dense_weight(adapters, layer), layer.bias)
        torch.testing.assert_close(layer(x), expected)


def _dense_weight(adapters: AdapterSet, layer: nn.Linear) -> Tensor:
    """W R^T from the parameters, without anything kept."""
    dense = torch.block_diag(*rotations(next(adapters.parameters()).detach(), 4))
    return layer.weight @ dense.T


def test_side_is_chosen_by_tokens_against_outputs() -> None:
    layer = nn.Linear(8, 16)
    _attach(layer, block_size=4)
    with mock.patch("visiontune.adapters.oft.rotated_linear", wraps=oft.rotated_linear) as weight_side:
        layer(torch.randn(16, 8))
        assert weight_side.call_count == 0
        layer(torch.randn(17, 8))
        assert weight_side.call_count == 1


def test_kept_weights_are_made_once_a_step_and_follow_base_and_parameters() -> None:
    layer = nn.Linear(8, 8)
    adapters = _attach(layer, block_size=4, keep_rotated=True)
    x = torch.randn(4, 8)
    with mock.patch("visiontune.adapters.oft.rotated", wraps=rotated) as made:
        layer(x), layer(x)
        assert made.call_count == 1
        for parameter in (next(adapters.parameters()), layer.weight):
            with torch.no_grad():
                parameter.mul_(1.5)
            expected = nn.functional.linear(x, adapters.weight("layer"), layer.bias)
            torch.testing.assert_close(layer(x), expected)
        layer.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, adapters.weight("layer"), layer.bias))


def test_rotation_helpers_agree_with_the_dense_matrix() -> None:
    r = rotations(torch.randn(6, 6, dtype=torch.float64), 4)
    dense = torch.block_diag(*r)
    x, w = torch.randn(3, 5, 24, dtype=torch.float64), torch.randn(7, 24, dtype=torch.float64)
    torch.testing.assert_close(rotate_input(x, r), x @ dense)
    torch.testing.assert_close(rotate_input(x.mT.contiguous().mT, r), x @ dense)
    torch.testing.assert_close(rotate_weight(w, r), w @ dense.T)
    torch.testing.assert_close(rotate_input(x[:0], r), x[:0])
    image = torch.randn(2, 24, 3, 5, dtype=torch.float64)
    expected = torch.einsum("nchw,cd->ndhw", image, dense)
    torch.testing.assert_close(rotate_channels(image, r), expected)
    last = rotate_channels(image.to(memory_format=torch.channels_last), r)
    torch.testing.assert_close(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_fits_a_random_rotation_which_lora_cannot_without_changing_energy() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(24, 16), torch.randn(256, 16)
    turn = torch.block_diag(*rotations(0.3 * torch.randn(2, 28), 8))
    target = x @ (w @ turn.T).T

    def fit(method: str, **config) -> tuple[float, float]:
        layer = nn.Linear(16, 24, bias=False)
        layer.weight.data.copy_(w)
        adapters = attach(nn.ModuleDict({"layer": layer}), method, targets="layer", **config)
        optimizer = torch.optim.Adam(adapters.parameters(), 0.02)
        losses = []
        for _ in range(150):
            loss = (layer(x) - target).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        energy = _energy(adapters.weight("layer").detach()).sum() / _energy(w).sum() - 1
        return losses[-1] / losses[0], abs(float(energy))

    ratio, energy = fit("oft", block_size=8)
    assert ratio < 1e-3
    assert energy < 1e-5
    ratio_lora, energy_lora = fit("lora", rank=3)
    assert ratio_lora > 10 * ratio
    assert energy_lora > 1e-3


@pytest.mark.parametrize(
    ("layer", "config", "b"),
    [
        (nn.Linear(64, 2), {}, 32),
        (nn.Linear(8, 2), {}, 8),
        (nn.Conv2d(4, 2, 3), {}, 18),
        (nn.Linear(64, 2), {"n_blocks": 4}, 16),
        (nn.Linear(64, 2), {"block_size": 10}, 8),
    ],
)
def test_block_size(layer: nn.Module, config: dict, b: int) -> None:
    v = next(_attach(layer, **config).parameters())
    assert v.shape[1] == b * (b - 1) // 2


def test_smaller_blocks_than_asked_for_are_said() -> None:
    with pytest.warns(UserWarning, match=r"1 layers have smaller blocks than adapter\.block_size=7 \('layer': 4\)"):
        _attach(nn.Linear(64, 2), block_size=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _attach(nn.Linear(64, 2), block_size=8)
        _attach(nn.Linear(64, 2), n_blocks=16)


@pytest.mark.parametrize(
    ("layer", "config", "message"),
    [
        (nn.Linear(64, 2), {"n_blocks": 5}, "n_blocks=5 does not fit the 64 inputs of 'layer'"),
        (nn.Linear(37, 2), {}, "37 inputs, which no block of 2 to 32 divides"),
        (nn.Linear(8, 2), {"block_size": 1}, "block_size"),
        (nn.Linear(8, 2), {"cayley": "solve"}, "exact"),
        (nn.Embedding(8, 2), {}, "Embedding; this method adapts Linear"),
    ],
)
def test_impossible_options_are_refused(layer: nn.Module, config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _attach(layer, **config)


def test_scale_keeps_rotations() -> None:
    layer = nn.Linear(16, 20).double()
    adapters = _attach(layer, block_size=8)
    adapters.scale = 0.3
    w, turned = layer.weight, adapters.weight("layer")
    torch.testing.assert_close(turned @ turned.T, w @ w.T)
    assert 0.1 < (turned - w).norm() / w.norm() < 0.6


@pytest.mark.parametrize("std", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("b", [5, 8, 12, 32, 36, 64, 72])
def test_inverse_by_quarters(b: int, std: float) -> None:
    v = std * torch.randn(3, b * (b - 1) // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = torch.eye(b, dtype=torch.float64) - skew(v, b)
    torch.testing.assert_close(inverse(a), torch.linalg.inv(a), rtol=1e-11, atol=1e-13)
    assert oft.orthogonality_error(cayley(skew(v.float(), b))[0]) < 1e-5
