"""Inversion: exact where the step's equation has a known solution, and the way back of real pictures."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_model

from visiontune import load_model
from visiontune.core import Condition
from visiontune.diffusion.guidance import CFG
from visiontune.diffusion.inversion import accelerated, invert
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import DETERMINISTIC, Keep, Start, rollout
from visiontune.diffusion.transition import kernel
from visiontune.errors import UserError
from visiontune.guidance import apg
from visiontune.guidance.stack import GuidanceStack
from visiontune.ops.pixels import to_tensor
from visiontune.pocket import scenes, world

EXACT = {"rtol": 1e-10, "atol": 1e-12}
STEPS = 6


class Linear:
    """Predicts a matrix times x_t, in float64; guided away from nothing."""

    device = torch.device("cpu")

    def __init__(self, prediction):
        scheduler = DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", prediction_type="v_prediction")
        noise = Schedule.from_scheduler(scheduler)
        fields = {**vars(noise), "prediction": prediction}
        self.schedule = Schedule.flow() if prediction == "flow" else Schedule(**fields)
        self.matrix = 0.3 * torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        self.calls = 0

    def latent_shape(self):
        return 4, 1, 1

    def chain(self, steps, shape):
        return self.schedule.timesteps(steps)

    def predict(self, x_t, t, cond):
        self.calls += 1
        return torch.einsum("ij,bjhw->bihw", self.matrix, x_t) * cond.pooled.view(-1, 1, 1, 1)

    def unconditional(self, count):
        return told(*[0.5] * count)


def told(*strengths):
    return Condition(tokens=torch.zeros(len(strengths), 1, 1), pooled=torch.tensor(strengths, dtype=torch.float64))


def latents(rows=2):
    return torch.randn(rows, 4, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_refined_it_solves_every_step_of_a_linear_network(prediction):
    model, x_0, cond = Linear(prediction), latents(), told(1.0, 0.4)
    found = invert(model, x_0, cond, chain=STEPS, iterations=40, tolerance=1e-13, most_error=1e-9)
    start, end = model.chain(STEPS, (4, 1, 1))
    of_x, of_pred, _ = kernel(model.schedule, start, end, DETERMINISTIC)
    for row, strength in enumerate((1.0, 0.4)):
        x = x_0[row].flatten()
        for i in reversed(range(STEPS)):
            x = torch.linalg.solve(
                of_x[i] * torch.eye(4, dtype=torch.float64) + of_pred[i] * strength * model.matrix, x
            )
            torch.testing.assert_close(found.latents[row, i].flatten(), x, **EXACT)
    assert float(found.residual.max()) < 1e-12 and float(found.error.max()) < 1e-9
    assert model.calls < STEPS * 21, "steps that have converged are left"


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_plain_it_evaluates_each_step_once_where_it_ends(prediction):
    model, x_0, cond = Linear(prediction), latents(), told(1.0, 0.4)
    found = invert(model, x_0, cond, chain=STEPS, most_error=None)
    assert model.calls == STEPS and found.error is None
    start, end = model.chain(STEPS, (4, 1, 1))
    of_x, of_pred, _ = kernel(model.schedule, start, end, DETERMINISTIC)
    x = x_0
    for i in reversed(range(STEPS)):
        x = (x - of_pred[i] * model.predict(x, start[i : i + 1], cond)) / of_x[i]
        torch.testing.assert_close(found.at(start[i]), x, **EXACT)
    assert torch.equal(found.noise, found.latents[:, 0]) and torch.equal(found.latents[:, -1], x_0)


def test_flow_goes_back_along_the_velocity():
    """Euler: x_t = x_next + (sigma_t - sigma_next) v."""
    model, x_0, cond = Linear("flow"), latents(), told(1.0, 0.4)
    found = invert(model, x_0, cond, chain=1, most_error=None)
    torch.testing.assert_close(found.noise, x_0 + model.predict(x_0, torch.ones(2), cond), **EXACT)


def test_the_way_is_that_of_a_rollout_with_its_guidance():
    model, x_0, cond = Linear("v"), latents(), told(1.0, 0.4)
    guidance = CFG(scale=2.0)
    found = invert(model, x_0, cond, guidance=guidance, chain=STEPS, iterations=40, tolerance=1e-12)
    start = Start(latents=found.noise)
    there = rollout(model, cond, guidance=guidance, chain=found.chain, start=start, keep=Keep(history=True))
    torch.testing.assert_close(found.latents, there.latents, rtol=1e-8, atol=1e-9)
    without = invert(model, x_0, cond, chain=STEPS, iterations=40)
    assert float((without.noise - found.noise).abs().max()) > 1e-2


def test_acceleration_solves_a_linear_equation_in_as_many_points_as_it_has_unknowns():
    matrix, goal = Linear("v").matrix, latents(1)[0].flatten()
    x, tried, given = torch.zeros(1, 4, dtype=torch.float64), [], []
    for _ in range(5):
        tried.append(x)
        given.append(x @ matrix.T + goal)
        x = accelerated(tried, given)
    torch.testing.assert_close(x[0], torch.linalg.solve(torch.eye(4) - matrix, goal), rtol=1e-6, atol=1e-6)
    # A step that goes nowhere has nothing to combine.
    assert torch.equal(accelerated([x, x, x], [x, x, x]), x)


def test_rows_do_not_depend_on_each_other():
    model, x_0, cond = Linear("eps"), latents(), told(1.0, 0.4)
    options = {"chain": STEPS, "iterations": 12, "most_error": None}
    both = invert(model, x_0, cond, **options)
    for row in range(2):
        alone = invert(model, x_0[row : row + 1], cond[row], **options)
        torch.testing.assert_close(both.latents[row : row + 1], alone.latents, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both.residual[row : row + 1], alone.residual, rtol=1e-3, atol=0)


def test_what_cannot_be_inverted_is_one_line():
    model, x_0, cond = Linear("eps"), latents(), told(3.0, 3.0)
    with pytest.raises(UserError, match="raise iterations or the number of steps, lower the guidance"):
        invert(model, x_0, cond, chain=STEPS, most_error=1e-3)
    with pytest.raises(UserError, match="forgets where it came from"):
        invert(Linear("x0"), x_0, cond, chain=STEPS)
    with pytest.raises(UserError, match="nothing was kept at timestep 1"):
        invert(model, x_0, cond, chain=STEPS, most_error=None).at(1)
    with pytest.raises(UserError, match="set momentum to 0"):
        invert(model, x_0, cond, guidance=GuidanceStack([apg.Config(scale=3)]), chain=STEPS)
    with pytest.raises(UserError, match="masked tokens"):
        invert(tiny_model("amused"), x_0, cond)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_families_go_back_and_there(family):
    """Random networks are far steeper than trained ones, so this one's output is damped."""
    model = tiny_model(family)
    last = model.denoiser.conv_out if family == "sd" else model.denoiser.proj_out
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.mul_(0.1)
    x_0 = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(1))
    cond = model.embed(["a red circle", ""])
    plain = invert(model, x_0, cond, chain=4, most_error=None)
    refined = invert(model, x_0, cond, chain=4, iterations=5, most_error=1e-4)
    assert refined.latents.shape == (2, 5, *x_0.shape[1:])
    assert bool((refined.residual < plain.residual).all())


def test_refined_it_brings_a_real_picture_back_on_a_trained_model():
    model = load_model("pocket/sd")
    scene, caption = next(scenes.stream(5))
    pixels = to_tensor(world.render(scene)[None])
    x_0, cond = model.encode(pixels * 2 - 1, sample=False), model.embed([caption])
    plain = invert(model, x_0, cond, chain=25)
    assert 1e-2 < float(plain.error) < 0.1
    refined = invert(model, x_0, cond, chain=25, iterations=15, most_error=1e-3)
    assert float(refined.error) < 1e-3
    # Plain, the noise has too little of what the chain starts with.
    assert float(plain.noise.std()) < float(refined.noise.std()) < 1.1
