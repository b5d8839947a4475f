"""Rollouts, on a stand-in whose chain is known in closed form."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from visiontune.core import Condition
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import guided, rollout
from visiontune.diffusion.transition import DDIM


class Ideal:
    """Predicts the noise exactly, for data that is the one point `cond.pooled`."""

    latent_channels, downsample, resolution = 2, 8, 32
    device = torch.device("cpu")

    def __init__(self):
        self.schedule = Schedule.from_scheduler(DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear"))
        self.calls: list[tuple[Condition, torch.Tensor]] = []

    def predict(self, x_t, t, cond):
        self.calls.append((cond, t))
        alpha, sigma = self.schedule.levels(t, 4)
        return (x_t - alpha.float() * cond.pooled[:, :, None, None]) / sigma.float()

    def unconditional(self, count):
        return Condition(tokens=torch.zeros(count, 1, 1), pooled=torch.zeros(count, 2))


def condition(*points, **extra) -> Condition:
    pooled = torch.tensor(points)
    return Condition(tokens=torch.zeros(len(points), 1, 1), pooled=pooled, extra=extra)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_exact_denoiser_reaches_its_data(eta):
    cond = condition([1.0, -2.0], [0.5, 3.0])
    generator = torch.Generator().manual_seed(0)
    final = rollout(Ideal(), cond, steps=10, dynamics=DDIM(eta=eta), generator=generator).final
    expected = cond.pooled[:, :, None, None].expand(2, 2, 4, 4)
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-3)


def test_history_runs_from_the_start_to_the_end():
    model, start = Ideal(), torch.randn(1, 2, 4, 4)
    trajectory = rollout(model, condition([1.0, 2.0]), steps=4, latents=start, history=True)
    assert trajectory.latents.shape == (1, 5, 2, 4, 4)
    assert torch.equal(trajectory.latents[:, 0], start)
    assert torch.equal(trajectory.latents[:, -1], trajectory.final)
    assert trajectory.timesteps.tolist() == [750, 500, 250, 0] == [int(t) for _, t in model.calls]
    assert rollout(model, condition([1.0, 2.0]), steps=4, latents=start).latents is None


def test_one_generator_per_row_makes_rows_independent_of_their_batch():
    cond = condition([1.0, 2.0], [3.0, 4.0])

    def run(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return rollout(Ideal(), cond[torch.tensor(rows)], steps=1, dynamics=DDIM(), generator=generators, history=True)

    together = run([0, 1]).latents
    assert torch.equal(together[1:], run([1]).latents)
    assert not torch.equal(together[0, 0], together[1, 0])


def test_size_sets_the_latents_drawn():
    final = rollout(Ideal(), condition([0.0, 0.0]), steps=1, size=(16, 48), generator=torch.Generator()).final
    assert final.shape == (1, 2, 2, 6)


def test_guidance_is_one_call_and_shares_the_extra_conditioning():
    model, cond = Ideal(), condition([1.0, 2.0], time_ids=torch.ones(1, 6))
    guided(model, torch.zeros(1, 2, 4, 4), torch.tensor([10]), cond, None, 3.0)
    ((both, t),) = model.calls
    assert torch.equal(both.pooled, torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    assert torch.equal(both.extra["time_ids"], torch.ones(2, 6))
    assert t.tolist() == [10, 10]


def test_guided_rollout_overshoots_by_the_scale():
    """For point data the guided score is that of the point u + cfg_scale (c - u)."""
    uncond = condition([1.0, 0.0])
    final = rollout(Ideal(), condition([2.0, 1.0]), uncond=uncond, cfg_scale=3.0, steps=10).final
    torch.testing.assert_close(
        final, torch.tensor([4.0, 3.0])[None, :, None, None].expand(1, 2, 4, 4), atol=1e-3, rtol=0
    )


def test_a_start_for_another_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="2 latents for 1 conditions"):
        rollout(Ideal(), condition([1.0, 2.0]), latents=torch.zeros(2, 2, 4, 4))
