"""Rollouts, on a stand-in whose chain is known in closed form."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from visiontune.core import Condition
from visiontune.diffusion.dynamics import CPS, DDIM, FlowODE
from visiontune.diffusion.guidance import classifier_free, guided
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Keep, Start, rollout
from visiontune.diffusion.transition import log_prob, transition
from visiontune.errors import UserError


class Ideal:
    """Predicts the noise exactly, for data that is the one point `cond.pooled`."""

    device = torch.device("cpu")

    def __init__(self):
        self.schedule = Schedule.from_scheduler(DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear"))
        self.calls: list[tuple[Condition, torch.Tensor]] = []

    def latent_shape(self, height=32, width=32):
        return 2, height // 8, width // 8

    def chain(self, steps, shape):
        return self.schedule.timesteps(steps)

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
    final = rollout(Ideal(), cond, chain=10, dynamics=DDIM(eta=eta), start=Start(generator=generator)).final
    expected = cond.pooled[:, :, None, None].expand(2, 2, 4, 4)
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-3)


def test_history_runs_from_the_start_to_the_end():
    model, start = Ideal(), torch.randn(1, 2, 4, 4)
    trajectory = rollout(model, condition([1.0, 2.0]), chain=4, start=Start(latents=start), keep=Keep(history=True))
    assert trajectory.latents.shape == (1, 5, 2, 4, 4)
    assert torch.equal(trajectory.latents[:, 0], start)
    assert torch.equal(trajectory.latents[:, -1], trajectory.final)
    assert trajectory.timesteps.tolist() == [750, 500, 250, 0] == [int(t) for _, t in model.calls]
    assert rollout(model, condition([1.0, 2.0]), chain=4, start=Start(latents=start)).latents is None


def test_one_generator_per_row_makes_rows_independent_of_their_batch():
    cond = condition([1.0, 2.0], [3.0, 4.0])

    def run(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return rollout(
            Ideal(),
            cond[torch.tensor(rows)],
            chain=1,
            dynamics=DDIM(),
            start=Start(generator=generators),
            keep=Keep(history=True),
        )

    together = run([0, 1]).latents
    assert torch.equal(together[1:], run([1]).latents)
    assert not torch.equal(together[0, 0], together[1, 0])


def test_size_sets_the_latents_drawn():
    final = rollout(
        Ideal(), condition([0.0, 0.0]), chain=1, start=Start(size=(16, 48), generator=torch.Generator())
    ).final
    assert final.shape == (1, 2, 2, 6)


def test_guidance_is_one_call_and_shares_the_extra_conditioning():
    model, cond = Ideal(), condition([1.0, 2.0], time_ids=torch.ones(1, 6))
    guided(model, torch.zeros(1, 2, 4, 4), torch.tensor([10]), cond, None, classifier_free(3.0))
    ((both, t),) = model.calls
    assert torch.equal(both.pooled, torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    assert torch.equal(both.extra["time_ids"], torch.ones(2, 6))
    assert t.tolist() == [10, 10]


def test_guided_rollout_overshoots_by_the_scale():
    """For point data the guided score is that of the point u + cfg_scale (c - u)."""
    uncond = condition([1.0, 0.0])
    final = rollout(Ideal(), condition([2.0, 1.0]), uncond=uncond, guidance=classifier_free(3.0), chain=10).final
    torch.testing.assert_close(
        final, torch.tensor([4.0, 3.0])[None, :, None, None].expand(1, 2, 4, 4), atol=1e-3, rtol=0
    )


def test_a_start_for_another_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="2 latents for 1 conditions"):
        rollout(Ideal(), condition([1.0, 2.0]), start=Start(latents=torch.zeros(2, 2, 4, 4)))


def test_noise_of_a_row_is_that_of_its_generator_whatever_the_batch():
    cond = condition([1.0, 2.0], [3.0, 4.0], [5.0, 6.0])

    def run(*rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        which = torch.tensor(rows)
        return rollout(
            Ideal(),
            cond[which],
            chain=4,
            dynamics=DDIM(eta=1.0),
            start=Start(generator=generators),
            keep=Keep(log_probs=True),
        )

    together, pair = run(0, 1, 2), run(2, 0)
    for name in ("noise", "latents", "log_probs", "final"):
        assert torch.equal(getattr(together, name)[[2, 0]], getattr(pair, name)), name
    assert not torch.equal(together.noise[0], together.noise[1])


def test_given_noise_repeats_a_rollout():
    cond = condition([1.0, 2.0])
    first = rollout(
        Ideal(),
        cond,
        chain=4,
        dynamics=DDIM(eta=1.0),
        start=Start(generator=torch.Generator()),
        keep=Keep(history=True),
    )
    again = rollout(
        Ideal(),
        cond,
        chain=4,
        dynamics=DDIM(eta=1.0),
        start=Start(latents=first.latents[:, 0], noise=first.noise),
        keep=Keep(history=True),
    )
    assert torch.equal(first.latents, again.latents)
    assert rollout(Ideal(), cond, chain=4, start=Start(generator=torch.Generator())).noise is None
    with pytest.raises(ValueError, match=r"noise of shape \(1, 4, 2, 4, 4\), not \(1, 3, 2, 4, 4\)"):
        rollout(Ideal(), cond, chain=3, dynamics=DDIM(eta=1.0), start=Start(noise=first.noise))


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_scores_are_of_the_transitions_emitted(reduce, dtype):
    """From the stored latents alone, so whatever rounding was done came before the score."""
    model, cond = Ideal(), condition([1.0, 2.0], [3.0, 4.0])
    made = rollout(
        model,
        cond,
        chain=5,
        dynamics=DDIM(eta=0.8),
        start=Start(generator=torch.Generator()),
        keep=Keep(log_probs=True, reduce=reduce, dtype=dtype),
    )
    assert made.latents.dtype == (dtype or torch.float32)
    assert made.log_probs.shape == (2, 5)
    assert torch.equal(made.final, made.latents[:, -1].float())
    assert made.scored.tolist() == [True] * 4 + [False]  # this schedule ends clean
    assert not made.log_probs[:, 4].any()
    for i in range(4):
        x, x_next = made.latents[:, i].float(), made.latents[:, i + 1].float()
        t, t_next = made.timesteps[i].expand(2), made.ends[i].expand(2)
        mean, std = transition(model.schedule, model.predict(x, t, cond), x, t, t_next, DDIM(eta=0.8))
        assert torch.equal(made.log_probs[:, i], log_prob(x_next, mean, std, reduce))


@pytest.mark.parametrize(
    ("dynamics", "remedy"), [(DDIM(), "set its eta above 0"), (CPS(eta=0.0), "set its eta above 0")]
)
def test_scores_without_noise_are_refused_before_sampling(dynamics, remedy):
    model = Ideal()
    with pytest.raises(UserError, match=f"'{dynamics.name}' adds no noise, so no step has a log-probability: {remedy}"):
        rollout(model, condition([1.0, 2.0]), dynamics=dynamics, keep=Keep(log_probs=True))
    with pytest.raises(UserError, match="sample with more steps"):
        rollout(model, condition([1.0, 2.0]), chain=1, dynamics=DDIM(eta=1.0), keep=Keep(log_probs=True))
    assert not model.calls


def test_flow_ode_names_its_stochastic_forms():
    model = Ideal()
    model.schedule = Schedule.flow()
    with pytest.raises(UserError, match=r"'flow-ode' adds no noise.*use flow-sde, dance-sde or cps"):
        rollout(model, condition([1.0, 2.0]), dynamics=FlowODE(), keep=Keep(log_probs=True))


def test_a_chain_may_end_early_in_one_step():
    """ReFL's: a few steps, then from there to the clean end at once."""
    model, start = Ideal(), torch.randn(1, 2, 4, 4)
    begin, end = model.schedule.timesteps(10)
    chain = (begin[:3], torch.cat([end[:2], torch.tensor([-1])]))
    made = rollout(model, condition([1.0, 2.0]), chain=chain, start=Start(latents=start), keep=Keep(history=True))
    assert made.timesteps.tolist() == begin[:3].tolist()
    assert made.latents.shape[1] == 4
    expected = torch.tensor([1.0, 2.0])[None, :, None, None].expand(1, 2, 4, 4)
    torch.testing.assert_close(made.final, expected, rtol=0, atol=1e-3)


def test_rows_and_devices_of_a_trajectory():
    cond = condition([1.0, 2.0], [3.0, 4.0], [5.0, 6.0])
    made = rollout(
        Ideal(),
        cond,
        guidance=classifier_free(2.0),
        chain=3,
        dynamics=DDIM(eta=1.0),
        start=Start(generator=torch.Generator()),
        keep=Keep(log_probs=True),
    )
    part = made[torch.tensor([2, 0])].to("cpu")
    assert (len(made), len(part), part.steps) == (3, 2, 3)
    assert torch.equal(part.latents, made.latents[[2, 0]])
    assert torch.equal(part.log_probs, made.log_probs[[2, 0]])
    assert torch.equal(part.cond.pooled, cond.pooled[[2, 0]])
    assert len(part.uncond) == 2
    assert len(made[1:].noise) == 2
