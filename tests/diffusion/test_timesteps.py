"""Every density under every shift against its closed form, and that no number of it is rounded on the way."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import integrate, optimize, stats
from tiny import tiny_model

from visiontune.diffusion.schedule import Schedule, shifted
from visiontune.diffusion.timesteps import Histogram, Timesteps, spread
from visiontune.errors import UserError
from visiontune.schema import from_mapping

COUNT = 20_000
# A distance that one in a thousand samples of the right distribution has.
FAR = 1.95 / math.sqrt(COUNT)
DENSITIES = {
    "uniform": {},
    "logit_normal": {"mean": 0.4, "std": 0.8},
    "mode": {"scale": 1.29},
    "cosmap": {},
    "beta": {"alpha": 0.6, "beta": 1.7},
    "inverted_parabola": {},
}
# A family with its options, and the size of its pictures: what its sampler shifts by is worked out by hand below.
MODELS = {
    "none": ("flux", {"schnell": True}, (16, 16), 1.0),
    "static": ("sd3", {}, (16, 16), 3.0),
    "tokens": ("flux", {}, (16, 16), math.exp(0.5 + (1.15 - 0.5) / (64 - 4) * (16 - 4))),
    "more tokens": ("flux", {}, (32, 48), math.exp(0.5 + (1.15 - 0.5) / (64 - 4) * (96 - 4))),
    "other steps": ("flux2", {}, (16, 16), math.exp(0.00016927 * 16 + 0.45666666)),
}


def mode(u, scale):
    """Equation 20 of the paper."""
    return 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)


def parabola(s):
    return 2 - 7.7 * (s - 0.5) ** 2


def probability(density, s, mean=0.0, std=1.0, scale=1.29, alpha=2.0, beta=2.0):
    """P(share <= s) before any shift, from the definitions."""
    match density:
        case "uniform":
            return s
        case "logit_normal":
            return stats.norm.cdf(np.log(s / (1 - s)), mean, std)
        case "mode":
            return 1 - optimize.brentq(lambda u: mode(u, scale) - s, 0, 1)
        case "cosmap":
            return 2 / np.pi * np.arctan(s / (1 - s))
        case "beta":
            return stats.beta.cdf(s, alpha, beta)
    return integrate.quad(parabola, 0, s)[0] / integrate.quad(parabola, 0, 1)[0]


@functools.cache
def unshifted(**options):
    """The distribution of shares, on a grid fine enough to be read between."""
    grid = np.linspace(0, 1, 2001)
    return grid, [0, *(probability(s=s, **options) for s in grid[1:-1]), 1]


def closed_form(k=1.0, **options):
    """That of shares moved by k."""
    return lambda x: np.interp(x / (k - (k - 1) * x), *unshifted(**options))


def distance(shares, **options):
    return stats.kstest(np.asarray(shares, dtype=np.float64), closed_form(**options)).statistic


def flow(k=1.0):
    return SimpleNamespace(schedule=Schedule.flow(), sampling_shift=lambda shape: k)


def table():
    return SimpleNamespace(schedule=Schedule.from_scheduler(DDPMScheduler()))


def shares(model, size=(16, 16), rows=COUNT, seed=0, **options):
    shape = model.latent_shape(*size) if hasattr(model, "latent_shape") else (4, 2, 2)
    t = Timesteps(**options).draw(model, shape, rows, torch.Generator().manual_seed(seed))
    return t.double() / model.schedule.num_train_timesteps


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("k", [1.0, 3.0, 0.4])
def test_draws_of_a_constant_shift_have_the_distribution_of_the_closed_form(density, k):
    options = {"density": density, **DENSITIES[density]}
    found = shares(flow(), shift=k, **options)
    assert distance(found, k=k, **options) < FAR
    assert distance(found, k=2 * k, **options) > 5 * FAR


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("case", MODELS)
def test_the_models_own_shift_is_that_of_its_sampler_at_the_size_of_the_latents(density, case):
    family, built, size, k = MODELS[case]
    model, options = tiny_model(family, **built), {"density": density, **DENSITIES[density]}
    found = shares(model, size, shift="model", **options)
    assert distance(found, k=k, **options) < FAR
    assert distance(found, k=1.5 * k, **options) > 5 * FAR
    assert k == 1 or distance(found, k=1, **options) > 5 * FAR
    assert distance(shares(model, size, **options), k=1, **options) < FAR


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("scale", [-1.0, 1.75])
def test_quantiles_and_distribution_are_inverse_to_each_other(density, scale):
    made = Timesteps(density=density, **{**DENSITIES[density], **({"scale": scale} if density == "mode" else {})})
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    s = made.quantile(u)
    assert s[0] == pytest.approx(0, abs=1e-12) and s[-1] == pytest.approx(1, abs=1e-12) and (s.diff() > 0).all()
    torch.testing.assert_close(made.cdf(s), u, rtol=0, atol=2e-8)  # where the density is infinite, the root of rounding
    expected = [probability(density, float(x), **DENSITIES[density] | {"scale": scale}) for x in s[1:-1:40]]
    torch.testing.assert_close(made.cdf(s[1:-1:40]), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [1.0, 3.0, 1 / 3, 1.7, 0.1, 1000.0])
def test_a_shift_leaves_both_ends_alone_and_is_undone_by_its_inverse(k):
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    moved = shifted(s, k)
    assert moved[0] == 0 and moved[-1] == 1
    torch.testing.assert_close(moved, k * s / (1 + (k - 1) * s))
    torch.testing.assert_close(shifted(moved, 1 / k), s)


@pytest.mark.parametrize("density", DENSITIES)
def test_a_range_keeps_its_part_of_the_shifted_density(density):
    options = {"density": density, **DENSITIES[density]}
    found = shares(flow(2.0), shift="model", low=0.3, high=0.85, **options).numpy()
    whole = closed_form(k=2.0, **options)
    least, most = whole(0.3), whole(0.85)
    assert found.min() >= np.float32(0.3) and found.max() <= np.float32(0.85)
    assert stats.kstest(found, lambda x: (whole(x) - least) / (most - least)).statistic < FAR


def test_rows_may_have_ranges_of_their_own():
    bounds = torch.tensor([[0.0, 0.4], [0.4, 1.0], [0.2, 0.3]]).repeat(2000, 1)
    made = Timesteps(density="mode", shift=2.0, low=0.1)
    t = made.draw(flow(), (4, 2, 2), len(bounds), torch.Generator().manual_seed(0), bounds=bounds) / 1000
    for row, (low, high) in enumerate([(0.1, 0.4), (0.4, 1.0), (0.2, 0.3)]):
        own = t[row::3]
        assert low - 1e-6 <= own.min() < low + 0.01 and high - 0.01 < own.max() <= high + 1e-6


@pytest.mark.parametrize("split", [0.57, 0.9, 0.9004])
def test_adjacent_ranges_of_a_table_share_no_timestep_and_leave_none_out(split):
    bounds = torch.tensor([[0.0, split], [split, 1.0]], dtype=torch.float64).repeat(COUNT // 2, 1)
    # As far as uniform numbers go, and what rounds to the bound itself.
    u = torch.linspace(0, 1, COUNT // 2, dtype=torch.float64).repeat_interleave(2)
    t = Timesteps().draw(table(), (4, 2, 2), COUNT, torch.Generator(), u, bounds)
    below, above = t[::2].unique().tolist(), t[1::2].unique().tolist()
    place = round(split * 1000, 6)
    first, whole = math.floor(place), place.is_integer()
    assert below == list(range(first if whole else first + 1)) and above == list(range(first, 1000))


def test_a_share_of_rows_is_drawn_from_the_whole_schedule():
    """Of N ranges of one width, one has p / N + 1 - p of its run's rows (DeMe, section 3.2)."""
    for p in (0.0, 0.3, 1.0):
        t = Timesteps(low=0.25, high=0.5, global_share=p).draw(
            flow(), (4, 2, 2), COUNT, torch.Generator().manual_seed(0)
        )
        inside = ((t >= 250) & (t <= 500)).double().mean()
        assert abs(float(inside) - (p / 4 + 1 - p)) < 4 * math.sqrt(0.25 / COUNT) * (p in (0.3, 1.0)) + 1e-9
    plain, none = Timesteps(low=0.25), Timesteps(low=0.25, global_share=0.0)
    drawn = [one.draw(flow(), (4, 2, 2), 9, torch.Generator().manual_seed(1)) for one in (plain, none)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("k", [1.0, 2.5])
def test_tables_are_drawn_from_by_the_same_densities(density, k):
    """Timestep n stands for the shares from n to n + 1 thousandths."""
    options = {"density": density, **DENSITIES[density]}
    t = Timesteps(shift=k, **options).draw(table(), (4, 2, 2), COUNT, torch.Generator().manual_seed(1))
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    below = t.bincount(minlength=1000).cumsum(0) / COUNT

    def apart(k):
        return np.abs(below.numpy() - closed_form(k=k, **options)(np.arange(1, 1001) / 1000)).max()

    assert apart(k) < FAR and apart(2 * k) > 5 * FAR


def test_a_table_has_no_shift_of_its_own():
    model = tiny_model("sd")
    assert model.sampling_shift(model.latent_shape()) == 1
    assert distance(shares(model, shift="model"), density="uniform") < FAR


@pytest.mark.parametrize(
    ("scheme", "told", "ours"),
    [
        # The scripts count from the noise, so that the mean of theirs has the other sign.
        ("logit_normal", {"logit_mean": 0.7, "logit_std": 0.8}, {"density": "logit_normal", "mean": -0.7, "std": 0.8}),
        ("mode", {"mode_scale": 1.29}, {"density": "mode"}),
        ("none", {}, {"density": "uniform"}),
    ],
)
def test_the_scripts_of_diffusers_draw_the_same_from_a_scheduler_with_a_constant_shift(scheme, told, ours):
    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    places = (compute_density_for_timestep_sampling(scheme, COUNT, **told) * 1000).long()
    theirs = scheduler.timesteps[places].double() / 1000
    own = SimpleNamespace(schedule=Schedule.from_scheduler(scheduler))
    own.sampling_shift = lambda shape: own.schedule.sampling_shift()
    # Their grid is of 1000 places.
    assert stats.ks_2samp(theirs, shares(own, shift="model", **ours)).statistic < FAR * math.sqrt(2) + 2e-3
    assert stats.ks_2samp(theirs, shares(own, **ours)).statistic > 5 * FAR


def test_the_density_is_that_of_the_sampled_flow_in_the_paper():
    """Equation 21: a cosine schedule's log-SNR at t' = 2 / pi arctan(s / (1 - s))."""
    made, u = Timesteps(density="cosmap"), torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    s = made.quantile(u)
    snr, cosine = ((1 - s) / s).square(), (torch.cos(math.pi / 2 * u) / torch.sin(math.pi / 2 * u)).square()
    torch.testing.assert_close(snr, cosine)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_timesteps_of_flow_are_float32_whatever_is_computed_in(dtype):
    model, options = tiny_model("flux"), {"density": "logit_normal", "shift": "model"}
    exact = shares(model, rows=400, **options)
    model.pipe.to(dtype or torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        t = Timesteps(**options).draw(model, model.latent_shape(), 400, torch.Generator().manual_seed(0))
        x_t = model.schedule.add_noise(torch.zeros(400, 1, 1, 1), torch.ones(400, 1, 1, 1), t)
    assert t.dtype == torch.float32
    u = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.special.ndtri(u).sigmoid()
    k = model.sampling_shift(model.latent_shape())
    torch.testing.assert_close(t.double(), 1000 * k * s / (1 + (k - 1) * s), rtol=6e-8, atol=0)
    torch.testing.assert_close(x_t.flatten().double(), exact, rtol=1.2e-7, atol=0)
    assert (t.bfloat16().float() != t).float().mean() > 0.9


def test_places_are_spread_over_the_density():
    u = spread(8, torch.Generator().manual_seed(0))
    assert (u * 8).long().tolist() == list(range(8))
    t = Timesteps(density="mode", shift=3.0).draw(flow(), (4, 2, 2), 8, torch.Generator(), u)
    assert (t.diff() > 0).all()


def test_a_histogram_counts_tenths():
    found = Histogram.of(torch.tensor([0.0, 0.05, 0.1, 0.95, 1.0], dtype=torch.float64))
    assert found.tenths == pytest.approx([0.4, 0.2, 0, 0, 0, 0, 0, 0, 0, 0.4]) and found.mean == pytest.approx(0.42)
    lines = found.lines()
    assert len(lines) == 10 and lines[0] == f"  0.0-0.1  40.0% {'#' * 40}" and lines[1].count("#") == 20
    assert lines[2] == "  0.2-0.3   0.0%"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": "logitnormal"}, "timesteps.density cannot be 'logitnormal'; did you mean 'logit_normal'?"),
        ({"shift": "modle"}, "timesteps.shift must be a number from 0.001 to 1000 or 'model', not 'modle'"),
        ({"shift": 0}, "timesteps.shift must be a number from 0.001 to 1000, not 0"),
        ({"density": "mode", "scale": 2}, "timesteps.scale must be a number from -1 to 1.75, not 2"),
        ({"density": "beta", "alpha": 0}, "timesteps.alpha must be a number from 0.01 to 1000, not 0"),
        ({"low": 0.5, "high": 0.5}, "timesteps: low must be below high, but they are 0.5 and 0.5"),
    ],
)
def test_what_no_density_has_is_refused(options, message):
    with pytest.raises(UserError) as error:
        from_mapping(Timesteps, options, "timesteps")
    assert str(error.value) == message


def test_a_range_that_holds_nothing_of_the_density_is_refused():
    made = Timesteps(density="beta", alpha=900, beta=900, low=0.9)
    with pytest.raises(UserError, match=r"nothing of density=beta lies between low=0\.9 and high=1: widen them"):
        made.draw(flow(), (4, 2, 2), 3, torch.Generator())


def test_options_are_read_as_recipes_spell_them():
    assert from_mapping(Timesteps, "beta") == Timesteps(density="beta")
    assert from_mapping(Timesteps, {"shift": "3"}) == Timesteps(shift=3.0)
    assert from_mapping(Timesteps, {"shift": "model"}) == Timesteps(shift="model")
