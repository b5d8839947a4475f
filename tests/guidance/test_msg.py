"""Mixing the score of a reference: as noise whatever the network predicts, with one noise a run."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from visiontune.core import Request
from visiontune.diffusion.guidance import CFG, guided
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.errors import UserError
from visiontune.guidance._pictures import latents_of
from visiontune.guidance.base import Point, Run
from visiontune.guidance.msg import Config, noise_difference
from visiontune.guidance.stack import GuidanceStack
from visiontune.models.pipeline import own_generator

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
REQUESTS = [Request(prompt=prompt, negative="small", seed=3) for prompt in ("a red circle", "green triangle")]


@functools.cache
def model(family="sd"):
    made = tiny_model(family)
    made.pipe.scheduler = made.sampler(made.samplers()[0])
    return made


def of(scale=1.0, **options):
    return GuidanceStack([*GuidanceStack.of([{"cfg": 3.0}]).terms, Config(scale=scale, reference=PICTURE, **options)])


def schedule(prediction):
    if prediction == "flow":
        return Schedule.flow()
    return replace(model().schedule, prediction=prediction)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_what_is_mixed_is_the_noise(prediction):
    made, rng = schedule(prediction), torch.Generator().manual_seed(0)
    p, one, z, other, x = torch.randn(5, 3, 4, 2, 2, generator=rng, dtype=torch.float64)
    t = torch.tensor([900, 500, 20])
    found = made.to_eps(p + 0.7 * noise_difference(made, (one, z), (other, x), t), x, t)
    expected = made.to_eps(p, x, t) + 0.7 * (made.to_eps(one, z, t) - made.to_eps(other, x, t))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    # Without any signal the predictions of the same latents differ by what they say.
    if prediction == "flow":
        end = torch.tensor([1000] * 3)
        assert torch.equal(noise_difference(made, (one, x), (other, x), end), one - other)


def test_of_the_picture_s_own_latents_it_is_cfg():
    made = tiny_model()
    for network in (made.denoiser, made.vae):
        network.double()
    cond, uncond = (
        replace(side, tokens=side.tokens.double()) for side in (made.embed(["a red circle"]), made.unconditional(1))
    )
    t, noise = torch.tensor([700]), torch.randn(1, *made.latent_shape(), generator=torch.Generator().manual_seed(5))
    point = Point(x=noise.double(), t=t, levels=[0.7], schedule=made.schedule, run=Run(model=made))
    with torch.no_grad():
        x = made.schedule.add_noise(latents_of(PICTURE, point, "msg"), noise.double(), t)
        stack = GuidanceStack([Config(scale=3.5, reference=PICTURE, seed=5, window=(0.0, 1.0))])
        found = guided(made, x, t, cond, uncond, stack)
        torch.testing.assert_close(found, guided(made, x, t, cond, uncond, CFG(scale=4.5)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_the_reference_has_the_noise_that_the_picture_begins_as(family):
    """In the stock pipeline as in rollouts, row by row, also where the first step has no signal."""
    made, stack = model(family), of(window=(0.45, 1.0), prompt="a blue square")
    plan = stack.plan(made, 4)
    acting = sum(level >= 0.45 for level in plan.levels)
    assert 1 < acting < 4 and plan.rows == (3,) * acting + (2,) * (4 - acting)
    pictures = made.draw(REQUESTS, steps=4, guidance=stack)
    noise = torch.stack([torch.randn(made.latent_shape(), generator=own_generator(one)) for one in REQUESTS])
    cond = made.embed([one.prompt for one in REQUESTS])
    with torch.no_grad():
        uncond = made.embed(["small"] * 2, negative=True)
        final = rollout(made, cond, uncond=uncond, guidance=stack, chain=4, start=Start(latents=noise)).final
        ours = (made.decode(final) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pictures, ours, rtol=0, atol=1e-5)
    np.testing.assert_allclose(made.draw(REQUESTS[1:], steps=4, guidance=stack), pictures[1:], rtol=0, atol=1e-5)
    other = of(window=(0.45, 1.0), prompt="large")
    assert np.abs(made.draw(REQUESTS, steps=4, guidance=other) - pictures).max() > 1e-3


def test_it_fades_over_the_lower_end_of_its_window():
    term = Config(scale=2.0, reference=PICTURE, window=(0.6, 1.0), fade=0.2)
    assert [round(term.at(level), 6) for level in (1.0, 0.8, 0.7, 0.65, 0.6, 0.5)] == [2.0, 2.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sd", {"reference": PICTURE.crop((0, 0, 16, 8))}, "reference has 16x8 pixels, which is another ratio"),
        ("sd", {"reference": "/nowhere/a.png"}, "/nowhere/a.png"),
        ("sd", {"window": (0.0, 0.4)}, "noises its reference as the picture begins, and does not act there: give it a"),
        ("flux", {"seed": 1}, "cannot mix other noise into a step that starts from pure noise: leave its seed out"),
        ("sd", {"window": (0.6, 0.61), "seed": 1}, "msg acts at none of the steps"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(family, options, message):
    term = Config(**{"reference": PICTURE, "window": (0.3, 1.0), **options})
    with pytest.raises(UserError, match=message):
        GuidanceStack([term]).plan(model(family), 2)


def test_where_the_start_is_not_known_a_seed_is_asked_for():
    made = model()
    with pytest.raises(UserError, match="does not know here as what noise the picture begins: give it a seed"):
        guided(made, torch.zeros(1, 4, 8, 8), torch.tensor([950]), made.unconditional(1), None, of())
    with pytest.raises(UserError, match="attach the stack to a model"), of(window=(0.0, 1.0)).attach(made.pipe):
        made.pipe("a red circle", num_inference_steps=1, height=16, width=16)
