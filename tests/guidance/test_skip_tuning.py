"""Skip-Tuning and ScaleLong: which skip is scaled by what, against the inputs of the layers that take them."""

from __future__ import annotations

import functools
from contextlib import ExitStack, contextmanager

import pytest
import torch
from families.sd import unet

from visiontune.errors import UserError
from visiontune.guidance import scalelong, skip_tuning
from visiontune.guidance._network import Network
from visiontune.guidance.base import Point
from visiontune.models.sd import StableDiffusion

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SKIPS = 4


@functools.cache
def network():
    """In float64: two stages, each of which takes two skips on the way up."""
    torch.manual_seed(0)
    made = unet(cross_attention_dim=8).double()
    return Network(source="tiny", denoisers={"unet": made}, structure=StableDiffusion.STRUCTURE, schedule=None)


def arguments(rows=2, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    x, words = (torch.randn(rows, *size, dtype=torch.float64, generator=drawn) for size in ((4, 8, 8), (3, 8)))
    return {"sample": x, "timestep": 500, "encoder_hidden_states": words}


def residuals(rows=2):
    """What a ControlNet adds to skips and middle."""
    drawn = torch.Generator().manual_seed(9)
    sizes = [(16, 8, 8), (16, 8, 8), (16, 4, 4), (32, 4, 4)]
    down = tuple(torch.randn(rows, *size, dtype=torch.float64, generator=drawn) for size in sizes)
    middle = torch.randn(rows, 32, 4, 4, dtype=torch.float64, generator=drawn)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


@torch.no_grad()
def predicted(**given):
    return network().denoiser(**given).sample


@torch.no_grad()
def shaped(term, levels=(0.5, 0.5), **given):
    point = Point(x=given["sample"][: len(levels)], t=torch.tensor(levels) * 1000, levels=levels, schedule=None)
    with term.shaping(network(), given, point, "both"):
        return network().denoiser(**given).sample


@contextmanager
def layers_scaled(factors):
    """The last channels of what each layer on the way up is given are the skip's; the first layer takes the deepest."""
    widths = [32, 16, 16, 16]
    layers = [layer for stage in network().denoiser.up_blocks for layer in stage.resnets]

    def scale(width, factor):
        def hook(module, args):
            return torch.cat([args[0][:, :-width], factor * args[0][:, -width:]], dim=1), *args[1:]

        return hook

    with ExitStack() as entered:
        for layer, width, factor in zip(layers, widths, factors, strict=True):
            handle = layer.register_forward_pre_hook(scale(width, factor))
            entered.callback(handle.remove)
        yield


TERMS = {
    "ramp": (skip_tuning.Config(bottom=0.7, top=1.0), [0.7, 0.8, 0.9, 1.0]),
    "none of the deepest": (skip_tuning.Config(bottom=0.0, top=1.0), [0, 1 / 3, 2 / 3, 1]),
    "half": (skip_tuning.Config(bottom=0.49, top=1.0, scale=0.5), [0.49**0.5, 0.66**0.5, 0.83**0.5, 1.0]),
    "powers": (scalelong.Config(scale=0.6), [0.6**3, 0.6**2, 0.6, 1.0]),
    "alike": (scalelong.Config(scale=0.5**0.5, alike=True), [0.5**0.5] * SKIPS),
}


@pytest.mark.parametrize("control", [{}, residuals()], ids=["", "controlled"])
@pytest.mark.parametrize(("term", "factors"), TERMS.values(), ids=TERMS)
def test_each_skip_is_scaled_by_its_factor(term, factors, control):
    """What a ControlNet adds to a skip is scaled with it."""
    given = {**arguments(), **control}
    with layers_scaled(factors):
        expected = predicted(**given)
    torch.testing.assert_close(shaped(term, **given), expected, **EXACT)
    plain = predicted(**given)
    assert (plain - expected).abs().max() > 1e-3
    # Nothing that it was given has changed, and nothing is left of it.
    assert torch.equal(predicted(**{**arguments(), **control}), plain)
    assert not any("forward" in vars(module) for module in network().denoiser.modules())


def test_one_skip_alone_is_zeroed():
    from visiontune.guidance import _skips

    stages, given = _skips.taking(network(), "test"), arguments()
    for skip in (0, SKIPS - 1):
        factors = [0.0 if i == skip else 1.0 for i in range(SKIPS)]
        with layers_scaled(factors):
            expected = predicted(**given)
        with _skips.scaled(stages, factors):
            torch.testing.assert_close(predicted(**given), expected, **EXACT)


def test_the_ramp_has_both_ends():
    found = skip_tuning.ramp(0.82, 0.97, 12)
    assert found[0] == 0.82 and found[-1] == pytest.approx(0.97, abs=1e-15) and sorted(found) == found
    assert skip_tuning.ramp(0.5, 1.0, 1) == [0.5]
    assert skip_tuning.Config(bottom=1.0, top=1.0).idle and not skip_tuning.Config().idle


@pytest.mark.parametrize("term", [skip_tuning.Config, scalelong.Config])
def test_factors_are_those_of_each_rows_level(term):
    """On either side of a step, from the level and not from a count of steps."""
    given, levels = arguments(rows=4), (0.9, 0.2)
    windowed = term(window=(0.5, 1.0))
    found, plain, whole = shaped(windowed, levels, **given), predicted(**given), shaped(term(), **given)
    torch.testing.assert_close(found[::2], whole[::2], **EXACT)
    torch.testing.assert_close(found[1::2], plain[1::2], **EXACT)
    weaker = term(schedule="linear", **({"scale": 0.5} if term is scalelong.Config else {"bottom": 0.5}))
    low = weaker.amount((0.0,), plain)
    assert low == (0.0 if term is scalelong.Config else 2.0)
    assert shaped(weaker, (0.0, 0.0), **given).isfinite().all()


@pytest.mark.parametrize("term", [skip_tuning.Config(), scalelong.Config()])
def test_networks_without_long_skips_are_refused(term):
    from visiontune.models.sd3 import StableDiffusion3

    other = Network(source="other", denoisers={}, structure=StableDiffusion3.STRUCTURE, schedule=None)
    with pytest.raises(UserError, match=f"{term.name} is for UNets.*'other' has no such skips: leave {term.name} out"):
        term.check(other)
