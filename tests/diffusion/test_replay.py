"""Stored transitions scored again: exactly as they were, under the weights of now, from the trajectory alone."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_model
from tiny_rollout import SD, TinyModel, prompts, rolled, start

from visiontune.adapters import attach
from visiontune.diffusion.dynamics import CPS, DDIM, DDPM, DanceSDE, FlowSDE
from visiontune.diffusion.replay import backpropagate_scores, micro_batches, reference, replay, revisit, rounding
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Keep, Start, rollout
from visiontune.diffusion.transition import gaussian_kl, log_prob

STEPS = 5


def sample(model, dynamics=None, **options):
    options = {"steps": STEPS, "cfg_scale": 3.0, "latents": start(), "log_probs": True, **options}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return rolled(model, model.embed(prompts()), dynamics=dynamics or DDIM(eta=0.8), generator=generator, **options)


def grads(model):
    made = [p.grad.clone() for p in model.denoiser()]
    model.zero_grad()
    return made


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("dynamics", [DDIM(eta=0.8), DDPM(), CPS()], ids=lambda d: d.name)
def test_before_an_update_every_ratio_is_exactly_one(dynamics, reduce, dtype):
    model = TinyModel()
    made = sample(model, dynamics, reduce=reduce, dtype=dtype)
    assert made.scored.all()
    now = replay(model, made)
    assert now.requires_grad
    assert torch.equal(now.detach(), made.log_probs)
    assert torch.equal(replay(model, made, checkpoint=True).detach(), made.log_probs)


@pytest.mark.parametrize("dynamics", [FlowSDE(), DanceSDE(), CPS()], ids=lambda d: d.name)
def test_flow_ratios_too(dynamics):
    model = TinyModel(Schedule.flow(shift=3.0))
    made = sample(model, dynamics)
    scored = torch.nonzero(made.scored).flatten()
    assert len(scored) >= STEPS - 1
    assert torch.equal(replay(model, made).detach(), made.log_probs[:, scored])


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("method", ["lora", "oft"])
def test_ratios_of_a_family_with_adapters_are_exactly_one(family, method):
    model = tiny_model(family)
    options = {"block_size": 4} if method == "oft" else {"rank": 2}
    adapters = attach({"unet": model.denoiser}, method, targets="attention", presets=model.presets(), **options).eval()
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.05)
    cond = model.embed(["a red circle", "a blue square"])
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        made = rolled(model, cond, cfg_scale=4.0, steps=3, dynamics=DDIM(eta=1.0), generator=generators, log_probs=True)
    now = replay(model, made)
    assert torch.equal(now.detach(), made.log_probs[:, made.scored])
    base = reference(model, made, adapters.disable())
    assert not base.requires_grad
    assert (base - now).abs().max() > 1e-4
    adapters.detach()
    assert torch.equal(base, replay(model, made).detach())


def test_chosen_steps_and_rows_are_those_of_the_whole():
    model = TinyModel()
    made = sample(model)
    rows = torch.tensor([2, 0])
    some = replay(model, made, steps=[3, 1], rows=rows)
    assert some.shape == (2, 2)
    torch.testing.assert_close(some.detach(), made.log_probs[rows][:, [3, 1]], rtol=0, atol=1e-12)
    assert torch.equal(replay(model, made, torch.tensor([3, 1]), rows), some)
    assert replay(model, made, steps=2, rows=slice(1, 2)).shape == (1, 1)
    mean, std = revisit(model, made, 3, rows)
    again = log_prob(made.latents[rows, 4], mean, std)
    assert torch.equal(again, some[:, 0])


def test_only_the_trajectory_is_read():
    """Whatever the model's default conditions and spacing have become, the stored ones count."""
    model = TinyModel()
    made = sample(model)
    assert not made.cond.tokens.requires_grad
    with torch.no_grad():
        model.text.weight.mul_(3)
    spacing = DDIMScheduler(**{**SD, "timestep_spacing": "trailing"})
    model.schedule = Schedule.from_scheduler(spacing)
    assert torch.equal(replay(model, made).detach(), made.log_probs)


def test_scores_follow_the_weights_and_their_gradient_is_right():
    model = TinyModel()
    made = sample(model)
    weights = torch.randn(3, STEPS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value():
        with torch.no_grad():
            return float((weights * replay(model, made)).sum())

    (weights * replay(model, made)).sum().backward()
    parameter = model.last.bias
    analytic = parameter.grad[0].item()
    with torch.no_grad():
        parameter[0] += 1e-5
        above = value()
        parameter[0] -= 2e-5
        below = value()
    assert abs((above - below) / 2e-5 - analytic) < 1e-6 * abs(analytic)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_backpropagating_a_matrix_is_the_gradient_of_one_graph(micro_batch):
    """PRDP's loss couples all steps and rows, and still sees nothing but the matrix."""
    model = TinyModel()
    made = sample(model)
    with torch.no_grad():
        for parameter in model.denoiser():
            parameter.mul_(1.05)

    def loss(scores):
        total = (scores - made.log_probs).sum(1)
        return (total[:, None] - total[None] - torch.arange(3.0).double()).square().mean()

    loss(replay(model, made)).backward()
    expected = grads(model)
    with torch.no_grad():
        matrix = replay(model, made)
    matrix.requires_grad_()
    backpropagate_scores(model, made, torch.autograd.grad(loss(matrix), matrix)[0], micro_batch=micro_batch)
    for one, two in zip(grads(model), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-14)


def test_weights_of_zero_cost_nothing():
    model = TinyModel()
    made = sample(model)
    weights = torch.zeros(3, 2, dtype=torch.float64)
    weights[2, 1] = 1.0
    model.calls = 0
    backpropagate_scores(model, made, weights, steps=[0, 3], micro_batch=1)
    assert model.calls == 1
    ours = grads(model)
    replay(model, made, 3, slice(2, 3)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(ours, grads(model), strict=True))
    with pytest.raises(ValueError, match=r"weights of shape \(3, 2\) for 3 rows and 5 steps"):
        backpropagate_scores(model, made, weights)


def test_micro_batches_cover_the_rows():
    assert list(micro_batches(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(micro_batches(3, None)) == [slice(0, 3)]


def test_a_live_condition_takes_the_gradient_to_its_encoder():
    model = TinyModel()
    made = sample(model)
    cond = model.embed(prompts())
    now = replay(model, made, cond=cond, uncond=model.unconditional(3))
    assert torch.equal(now.detach(), made.log_probs)
    now.sum().backward()
    assert model.text.weight.grad.abs().sum() > 0


def test_reference_runs_inside_its_context():
    model = TinyModel()
    made = sample(model)

    @contextmanager
    def without():
        kept = model.last.weight.detach().clone()
        with torch.no_grad():
            model.last.weight.zero_()
            yield
            model.last.weight.copy_(kept)

    base = reference(model, made, without(), steps=[0, 1], rows=slice(0, 2))
    assert base.shape == (2, 2)
    assert not base.requires_grad
    assert not torch.allclose(base, made.log_probs[:2, :2])
    mean, std = revisit(model, made, 0)
    assert not gaussian_kl(mean, mean.detach(), std).any()


def test_what_cannot_be_scored_is_refused():
    model = TinyModel(Schedule.from_scheduler(DDIMScheduler(**{**SD, "set_alpha_to_one": True})))
    made = sample(model)
    assert made.scored.tolist() == [True] * 4 + [False]
    assert replay(model, made).shape == (3, 4)
    with pytest.raises(ValueError, match="leave out the steps that are not `scored`"):
        replay(model, made, steps=[4])
    with pytest.raises(ValueError, match=r"sample it with Keep\(history=True\)"):
        replay(model, replace(made, latents=None))


@pytest.mark.parametrize("cfg_scale", [1.0, 5.0])
def test_rounding_is_found_before_other_weights_show_it(cfg_scale):
    """What bfloat16 adds to the way of the log-probabilities when the weights move, and float32 does not."""
    model = tiny_model("sd")
    rough = model.at(torch.bfloat16)
    with torch.no_grad():
        cond, uncond = model.embed(["a", "b c", "d", "e f g"]), model.unconditional(4)
        options = {"guidance": model.guidance(cfg_scale), "chain": 6, "dynamics": DDIM(eta=1.0)}
        noise = Start(generator=[torch.Generator().manual_seed(i) for i in range(4)])
        made = rollout(rough, cond, uncond=uncond, start=noise, keep=Keep(log_probs=True), **options)
        foreseen, exact = rounding(rough, made), rounding(model, made)
        before = [replay(one, made) for one in (rough, model)]
        for index, parameter in enumerate(model.main.parameters()):
            rng = torch.Generator().manual_seed(index)
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=rng) * parameter.square().mean().sqrt())
        ways = [replay(one, made) - old for one, old in zip((rough, model), before, strict=True)]
    found = (ways[0] - ways[1]).square().mean().sqrt()
    assert found / 3 < foreseen.square().mean().sqrt() < 3 * found
    assert exact.abs().max() < foreseen.abs().max() / 500
