"""Whichever objective noises clean latents, its timesteps are those of the option `timesteps`."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from scipy import stats
from tiny_training import TinyModel, tiny_batch

from visiontune import plugin
from visiontune.core import Batch, Condition
from visiontune.diffusion.schedule import Schedule
from visiontune.errors import UserError
from visiontune.objectives import denoising, diffusion_dpo, dpo_online, dreambooth, nft
from visiontune.objectives.base import Tools, generator
from visiontune.rewards.base import as_reward
from visiontune.schema import from_mapping

ROWS, COUNT, OWN = 2000, 4, 2.5
OPTIONS = {"timesteps": {"density": "logit_normal", "mean": -0.3, "std": 1.4, "shift": "model"}}
SUPERVISED = {"denoising": denoising, "dreambooth": dreambooth, "diffusion_dpo": diffusion_dpo}
ONLINE = {"dpo_online": dpo_online, "nft": nft}


class Flow(TinyModel):
    """The tiny model as a flow, whose sampler shifts by the size of the latents."""

    def __init__(self):
        super().__init__()
        self.schedule = Schedule.flow()

    def sampling_shift(self, shape):
        return OWN * math.prod(shape[-2:]) / 64


def far(t, k):
    """The distance of timesteps to the option's distribution under the shift k, over what chance may make it."""
    s = t.flatten().double().numpy() / 1000
    moved = s / (k - (k - 1) * s)
    found = stats.kstest(np.log(moved / (1 - moved)), stats.norm(-0.3, 1.4).cdf).statistic
    return found / (1.95 / math.sqrt(len(s)))


def of(objectives, name, **options):
    return objectives[name].build(from_mapping(objectives[name].Config, OPTIONS | options))


@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize("name", SUPERVISED)
def test_objectives_with_data_draw_at_the_size_of_their_batch(name, side):
    latents = torch.zeros(ROWS, 4, side, side)
    batch = Batch(data={}, cond=None, prompts=[""] * ROWS, weight=torch.ones(ROWS), prior=torch.zeros(ROWS), ids=[])
    t, _ = of(SUPERVISED, name).noised(Flow(), latents, batch, Tools(rng=generator(0)))
    k = OWN * side**2 / 64
    assert t.dtype == torch.float32 and far(t, k) < 1 and far(t, 3 * k) > 5
    places = (torch.arange(ROWS) + 0.5) / ROWS
    batch.data["quantile"] = places
    t, _ = of(SUPERVISED, name).noised(Flow(), latents, batch, Tools(rng=generator(0)))
    assert (t.diff() > 0).all() and far(t, k) < 0.1, "as a planned adapter looks at the task"


def collected(name, rows=500):
    latents = torch.zeros(rows, 1, 8, 8)
    own = {
        "dpo_online": {"chosen": latents, "rejected": latents, "weight": torch.ones(rows)},
        "nft": {"x_0": latents, "timesteps": torch.tensor([1000.0, 700.0, 300.0]), "optimality": torch.ones(rows)},
    }
    cond = Condition(tokens=torch.zeros(rows, 1, 1))
    return ONLINE[name].Collected(cond=cond, rows=torch.arange(rows), terms={}, **own[name])


@pytest.mark.parametrize("name", ONLINE)
def test_online_objectives_draw_one_in_each_part_of_the_density(name):
    objective = of(ONLINE, name, timestep_count=COUNT, steps=3)
    t, eps = objective.noised(Flow(), collected(name), 0, Tools())
    assert t.shape == (500, COUNT) and eps.shape == (500, COUNT, 1, 8, 8) and t.dtype == torch.float32
    assert far(t, OWN) < 1 and far(t, 3 * OWN) > 5
    parts = [t[:, k] for k in range(COUNT)]
    assert all(a.max() < b.min() for a, b in pairwise(parts))
    again, _ = objective.noised(Flow(), collected(name), 0, Tools())
    other, _ = objective.noised(Flow(), collected(name), 1, Tools())
    assert torch.equal(t, again) and not torch.equal(t, other)


def test_nft_takes_the_samplers_timesteps_unless_told_a_density():
    objective = nft.build(nft.Config(steps=3))
    t, _ = objective.noised(Flow(), collected("nft"), 0, Tools())
    assert objective.draw_timesteps(Flow(), (4, 8, 8), 3, generator(0)) is None
    assert all(sorted(row) == [300, 700, 1000] for row in t.tolist())
    t, _ = of(ONLINE, "nft", steps=3).noised(Flow(), collected("nft"), 0, Tools())
    assert t.shape == (500, 3) and len(t.unique()) == t.numel(), "as many as the sampler has"
    with pytest.raises(UserError, match="timestep_count must be at most steps"):
        from_mapping(nft.Config, {"timestep_count": 4, "steps": 3})


@pytest.mark.parametrize("name", [*SUPERVISED, *ONLINE])
def test_what_check_plots_is_what_is_drawn(name):
    objective = of(SUPERVISED | ONLINE, name)
    t = objective.draw_timesteps(Flow(), (4, 8, 8), ROWS, generator(3))
    assert far(t, OWN) < 1 < 5 < far(t, 1)
    assert torch.equal(t, objective.config.timesteps.draw(Flow(), (4, 8, 8), ROWS, generator(3)))


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("value", [4, "4", 1.5])
def test_a_number_of_timesteps_is_told_its_name_of_today(name, value):
    with pytest.raises(UserError, match=r"^objective\.timesteps is now objective\.timestep_count$"):
        plugin.configure("objectives", {"name": name, "timesteps": value}, "objective")
    _, config = plugin.configure("objectives", {"name": name, "timesteps": "mode"}, "objective")
    assert config.timesteps.density == "mode"


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_weights_are_those_of_diffusers(scheme):
    model = Flow()
    t = torch.tensor([1.0, 30.0, 500.0, 999.0, 1000.0])
    expected = compute_loss_weighting_for_sd3(scheme, t / 1000)
    torch.testing.assert_close(of(SUPERVISED, "denoising", weighting_scheme=scheme).weight(model, t), expected)
    batch = tiny_batch(model, 0, 5)
    draw = Tools(rng=generator(1))
    t, _ = denoising.build(denoising.Config()).noised(model, batch.data["image"], batch, draw)
    plain, weighted = (
        denoising.build(denoising.Config(weighting_scheme=name)).errors(model, batch, Tools(rng=generator(1)))
        for name in ("none", scheme)
    )
    torch.testing.assert_close(weighted, plain * compute_loss_weighting_for_sd3(scheme, t / 1000))


def test_the_cosine_map_as_a_weight_and_as_a_density_are_one_loss():
    model, error = Flow(), lambda t: torch.sin(t / 300).square().double()
    u = (torch.arange(20000) + 0.5) / 20000
    t = u * 1000
    weighted = (of(SUPERVISED, "denoising", weighting_scheme="cosmap").weight(model, t) * error(t)).mean()
    drawn = from_mapping(denoising.Config, {"timesteps": "cosmap"}).timesteps
    t = drawn.draw(model, (4, 8, 8), len(u), generator(0), u)
    assert float(error(t).mean()) == pytest.approx(float(weighted), rel=1e-4)
    assert abs(float(error(u * 1000).mean()) / float(weighted) - 1) > 0.01


def test_a_weight_that_would_be_infinite_stops_at_one_step_of_the_table():
    weight = of(SUPERVISED, "denoising", weighting_scheme="sigma_sqrt").weight(Flow(), torch.tensor([0.0, 0.5, 2.0]))
    torch.testing.assert_close(weight, torch.tensor([1e6, 1e6, 2.5e5]))


@pytest.mark.parametrize("name", [*SUPERVISED, "dpo_online"])
def test_weights_of_flow_are_refused_where_they_mean_nothing(name):
    reward = as_reward(lambda images, prompts, meta: images.mean((1, 2, 3)), "toy")
    objective = of(SUPERVISED | ONLINE, name, weighting_scheme="cosmap")
    objective.check(Flow(), reward)
    with pytest.raises(UserError, match=r"weighs errors of flow, and 'tiny' predicts eps: leave it out, or take"):
        objective.check(TinyModel(), reward)
    of(SUPERVISED | ONLINE, name).check(TinyModel(), reward)
    with pytest.raises(UserError, match="snr_gamma and weighting_scheme=cosmap both weigh timesteps: take"):
        of(SUPERVISED | ONLINE, name, weighting_scheme="cosmap", snr_gamma=5)


def test_an_objective_without_the_option_draws_none():
    built = plugin.configure("objectives", {"name": "ddpo"}, "objective")
    assert built[0].build(built[1]).draw_timesteps(SimpleNamespace(), (4, 8, 8), 3, generator(0)) is None
