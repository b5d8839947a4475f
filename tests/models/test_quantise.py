"""Splitting weights into codes and thin factors (LQ-LoRA): errors that fall, and layers that add up to them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune import config, models
from visiontune.adapters._quantised import dequantised, error_of, is_quantised
from visiontune.errors import UserError
from visiontune.models._quantise import TURNS, decompose, quantise, thin, through_codes, weighing

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

KINDS = ["int8", "fp8", "nf4"]
SHAPES = [(48, 64), (64, 48), (96, 96)]


def weight(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 8


def squares(shape: tuple[int, int]) -> Tensor:
    """Of very different size from row to row and from column to column."""
    rows, columns = (torch.logspace(-2, 1, n, dtype=torch.float64) for n in shape)
    return (weight(shape, 1) * rows[:, None] * columns.flip(0)).square()


def coarse(w: Tensor) -> Tensor:
    """Codes of few values, which need no library."""
    step = w.abs().max() / 7
    return (w / step).round() * step


def through(kind: str):
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
    return lambda w: through_codes(kind, torch.float32, w)


def net(kind: str | None, rank: int = 0, dtype: torch.dtype = torch.float32, **options) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64)).to(dtype).requires_grad_(False)
    if kind:
        pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
        quantise(made, kind, rank, **options)
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_the_thin_product_is_the_best_of_its_rank(shape) -> None:
    w = weight(shape)
    left, right = thin(w, 5)
    assert left.shape == (shape[0], 5) and right.shape == (5, shape[1])
    values = torch.linalg.svdvals(w)
    torch.testing.assert_close((w - left @ right).norm(), values[5:].norm())
    torch.testing.assert_close(left.norm(dim=0), values[:5].sqrt())
    torch.testing.assert_close(right.norm(dim=1), values[:5].sqrt())


def test_nothing_lost_is_split_into_zeros() -> None:
    left, right = thin(torch.zeros(6, 4, dtype=torch.float64), 2)
    assert not left.any() and not right.any()


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_falls_in_every_turn_and_is_that_of_what_comes_out(shape, rank, weighed) -> None:
    w = weight(shape)
    rows, columns = weighing(w, squares(shape) if weighed else None)
    coded, down, up, errors = decompose(w, rank, coarse, rows, columns)
    assert 2 <= len(errors) <= TURNS + 1
    assert all(after < before for before, after in itertools.pairwise(errors))

    def error(codes: Tensor, lost: Tensor) -> Tensor:
        return (rows[:, None] * (w - codes - lost) * columns).norm()

    assert float(error(coarse(w), torch.zeros_like(w))) == pytest.approx(errors[0])
    assert float(error(coarse(coded), up @ down)) == pytest.approx(errors[-1])
    # L is the best for these codes, in the norm that R and C weigh.
    best = torch.linalg.svdvals(rows[:, None] * (w - coarse(coded)) * columns)[rank:].norm()
    assert errors[-1] == pytest.approx(float(best))


def test_it_stops_before_the_error_rises() -> None:
    w = weight((48, 64))
    made = []

    def worse(values: Tensor) -> Tensor:
        made.append(values)
        return coarse(w) if len(made) == 1 else torch.zeros_like(w)

    coded, down, up, errors = decompose(w, 4, worse, *weighing(w, None))
    assert len(made) == 2 and len(errors) == 2
    assert torch.equal(coded, w)
    torch.testing.assert_close(up @ down, torch.matmul(*thin(w - coarse(w), 4)))


def test_weights_of_rows_and_columns_are_roots_of_mean_squares() -> None:
    w, values = weight((5, 7)), torch.rand(5, 7, dtype=torch.float64) + 0.1
    rows, columns = weighing(w, values)
    torch.testing.assert_close(rows.square(), values.mean(1) / values.mean())
    torch.testing.assert_close(columns.square(), values.mean(0) / values.mean())
    values[2] = 0
    assert 0 < float(weighing(w, values)[0][2]) < 0.1
    assert all(bool((part == 1).all()) for part in weighing(w, torch.zeros(5, 7)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_codes_stand_for_is_what_the_layer_makes_of_them(kind) -> None:
    layer, codes = net(None)[0], through(kind)
    assert torch.equal(codes(layer.weight.double()).float(), dequantised(net(kind)[0]))


def test_nf4_has_sixteen_values_of_each_block() -> None:
    """Plain arithmetic: the quantiles of QLoRA's appendix E times the largest magnitude in 64."""
    pytest.importorskip("bitsandbytes")
    book = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
    book += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
    w = weight((48, 64))
    largest = w.abs().amax(1, keepdim=True)
    nearest = ((w / largest)[..., None] - torch.tensor(book)).abs().argmin(-1)
    # The largest magnitudes themselves are in eight bits.
    expected = largest * torch.tensor(book, dtype=torch.float64)[nearest]
    torch.testing.assert_close(through("nf4")(w), expected, rtol=0.03, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 8])
def test_the_base_is_closer_to_the_weights_than_their_codes_are(kind, rank) -> None:
    plain, coded, kept = net(None), net(kind), net(kind, rank)
    for i in (0, 2):
        w = plain[i].weight
        assert is_quantised(kept[i]) and kept[i].weight.shape == coded[i].weight.shape
        lost, left = (w - dequantised(coded[i])).norm(), (w - dequantised(kept[i])).norm()
        assert left < (0.75 if rank == 8 else 0.99) * lost
        assert float((w - dequantised(kept[i])).abs().max()) <= error_of(kept[i], dequantised(kept[i]))
        w = w.double()
        errors = decompose(w, rank, through(kind), *weighing(w, None))[3]
        assert float(left) == pytest.approx(errors[-1], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_squares_lower_the_error_that_they_weigh(kind) -> None:
    plain, weighed = net(None), {"0": squares((48, 64))}
    w = plain[0].weight
    rows, columns = weighing(w, weighed["0"])
    errors = [
        float((rows[:, None] * (w - dequantised(made[0])) * columns).norm())
        for made in (net(kind, 8, squares=weighed), net(kind, 8), net(kind))
    ]
    assert errors[0] < 0.9 * errors[1] < errors[1] < errors[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_with_the_sum(kind, dtype) -> None:
    made = net(kind, 4, dtype)
    layer, x = made[0], torch.randn(5, 64).to(dtype)
    assert layer.lost_down.dtype == layer.lost_up.dtype == dtype
    found = layer(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, F.linear(x, dequantised(layer), layer.bias), rtol=2e-2, atol=2e-2)
    if dtype == torch.float32:
        # What the codes alone give is further away than the kernel's rounding.
        without = F.linear(x, dequantised(layer) - layer.lost_up @ layer.lost_down, layer.bias)
        assert (found - without).norm() > 3 * (found - F.linear(x, dequantised(layer), layer.bias)).norm()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), found.float(), rtol=5e-2, atol=5e-2)
    assert torch.equal(copy.deepcopy(made)(x), made(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_opens_closer_to_itself(kind) -> None:
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
    whole = models.load("pocket/sd")
    coded, kept = (models.load("pocket/sd", quantize=kind, quantize_rank=rank) for rank in (0, 8))
    assert len({model.fingerprint("denoiser") for model in (whole, coded, kept)}) == 3
    cond, x = whole.embed(["a red circle"]), torch.randn(1, whole.latent_channels, 8, 8)
    with torch.no_grad():
        a, b, c = (m.predict(x, torch.tensor([500]), cond) for m in (whole, coded, kept))
    assert (a - c).norm() < 0.85 * (a - b).norm()


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"set model\.quantize to nf4, fp8 or int8"):
        config.load_run("personalise/lora", ["model.quantize_rank=8", "data.root=x"])
    with pytest.raises(UserError, match=r"model\.quantize_rank"):
        config.load_run("personalise/lora", ["model.quantize=nf4", "model.quantize_rank=-1", "data.root=x"])
    made = nn.Sequential(nn.Linear(4, 6))
    for rank, given, message in (
        (0, {"0": torch.ones(6, 4)}, "give a rank above 0"),
        (2, {"1": torch.ones(6, 4)}, "squares of '1', which is no linear layer"),
        (2, {"0": torch.ones(4, 6)}, r"squares of '0' have shape \(4, 6\): its weight has \(6, 4\)"),
    ):
        with pytest.raises(UserError, match=message):
            models.quantise(made, "nf4", rank=rank, squares=given)
    assert type(made[0].weight) is nn.Parameter
