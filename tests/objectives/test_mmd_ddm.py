"""MMD fine-tuning: what is compared with what, and its gradient through the whole chain of few steps."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_online import PROMPTS, SCHEDULES, Drawing, batch_of, gradient, tools_of
from tiny_video import TinyVideo
from torch import nn
from torch.nn.functional import normalize

from visiontune.core import Batch
from visiontune.diffusion.guidance import CFG
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Start, Window, rollout
from visiontune.errors import UserError
from visiontune.objectives.base import generator
from visiontune.objectives.mmd_ddm import MMD, Config, build
from visiontune.ops.mmd import squared_mmd
from visiontune.ops.pixels import shown

OPTIONS = {"steps": 4, "few_steps": 3, "updates": 2, "cfg_scale": 3.0, "group": 3}


class Encoder:
    """Unit features of a random projection."""

    def image_features(self, images):
        flat = images.flatten(1).double()
        rows = torch.randn(flat.shape[1], 5, generator=generator("encoder"), dtype=torch.float64)
        return normalize(torch.sin(flat @ rows), dim=-1)


class Angle:
    """The mean of a picture as a direction."""

    def image_features(self, images):
        angle = 3 * images.double().mean((1, 2, 3))
        return torch.stack([angle.cos(), angle.sin()], dim=1)


def objective(encoder=None, **options) -> MMD:
    made = build(Config(**{**OPTIONS, **options}))
    made.encoder = encoder or Encoder()
    return made


def moved(prediction="eps") -> Drawing:
    model = Drawing(prediction)
    model.move(0.3)
    return model


def lent(model, **changed):
    return tools_of(model=model, rng=generator("noise"), seed=7, **changed)


def features(model, latents):
    return Encoder().image_features(shown(model.decode(latents)))


def by_hand(model, others, part, tools, dtype=torch.float32):
    """The distance with the graph of the whole chain."""
    batch = batch_of(3, 2)
    start = torch.stack([torch.randn(2, 4, 4, generator=rng) for rng in tools.generators(batch, "drawn", part)])
    drawn = rollout(
        model,
        model.embed(batch.prompts),
        chain=3,
        start=Start(latents=start.to(dtype)),
        window=Window(steps=3),
    )
    found = features(model, drawn.final)
    return (squared_mmd(found[:3], others[:3]) + squared_mmd(found[3:], others[3:])) / 2


@pytest.mark.parametrize("prediction", SCHEDULES)
@pytest.mark.parametrize("size", [None, 2])
def test_the_gradient_goes_through_every_step_of_every_picture(prediction, size):
    model = moved(prediction)
    made, tools = objective(micro_batch=size), lent(model, scale=8.0)
    with torch.no_grad():
        collected = made.collect(model, batch_of(3, 2), tools)
    for part in range(2):
        loss = made.update(model, collected, part, tools)
        found = gradient(model) / 8
        expected = by_hand(model, collected.features, part, tools)
        (whole,) = torch.autograd.grad(expected, model.delta)
        torch.testing.assert_close(loss.total, expected.float())
        torch.testing.assert_close(found, whole)


def test_the_gradient_is_that_of_finite_differences():
    model, step = moved(), 1e-5
    made, tools = objective(), lent(model)
    with torch.no_grad():
        collected = made.collect(model, batch_of(3, 2), tools)
    made.update(model, collected, 0, tools)
    found = gradient(model)
    direction = torch.randn(found.shape, generator=generator("direction"), dtype=torch.float64)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            model.delta.add_(sign * step * direction)
            ends.append(float(by_hand(model, collected.features, 0, tools, torch.float64)))
            model.delta.sub_(sign * step * direction)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float((found * direction).sum()), rel=1e-4)


def test_what_is_compared_with_are_guided_pictures_of_the_base_from_noise_of_their_own():
    model = moved()
    made, tools, batch = objective(), lent(model), batch_of(3, 2)
    with torch.no_grad():
        found = made.collect(model, batch, tools).features
        with model.disable():
            drawn = rollout(
                model,
                model.embed(batch.prompts),
                guidance=CFG(scale=3.0),
                chain=4,
                start=Start(generator=tools.generators(batch, "base")),
            )
        torch.testing.assert_close(found, features(model, drawn.final))
    starts = [torch.randn(4, generator=tools.generators(batch, *key)[0]) for key in (["base"], ["drawn", 0])]
    assert not torch.equal(*starts)


def pictures(model, latents=None) -> Batch:
    if latents is None:
        latents = torch.randn(4, *model.latent_shape(), generator=generator("pictures"))
    count = len(latents)
    return Batch(
        data={"image": latents},
        cond=None,
        prompts=[PROMPTS[i % len(PROMPTS)] for i in range(count)],
        weight=torch.ones(count),
        prior=torch.zeros(count, dtype=torch.bool),
        ids=[str(i) for i in range(count)],
    )


def test_real_pictures_are_compared_over_the_batch_and_checkpoints_change_nothing():
    model, batch = moved(), pictures(moved())
    loss = objective(compare_with="data").loss(model, batch, lent(model))
    (found,) = torch.autograd.grad(loss.total, model.delta)
    start = torch.randn(batch.data["image"].shape, generator=generator("noise"))
    drawn = rollout(model, model.embed(batch.prompts), chain=3, start=Start(latents=start), window=Window(steps=3))
    expected = squared_mmd(features(model, drawn.final), features(model, batch.data["image"]))
    (whole,) = torch.autograd.grad(expected, model.delta)
    torch.testing.assert_close(loss.total, expected.float())
    torch.testing.assert_close(found, whole)


class TwoPoints(Drawing):
    """Draws pictures of two shades, centre - spread and centre + spread, by the sign of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = Schedule.flow()
        self.shades = nn.Parameter(torch.tensor([0.4, 0.1], dtype=torch.float64))

    def predict(self, x_t, t, cond):
        centre, spread = self.shades
        clean = centre + spread * x_t.double().mean((1, 2, 3), keepdim=True).sign()
        return (x_t - clean) / (t.double() / 1000).view(-1, 1, 1, 1)

    def decode(self, latents):
        return latents.mean((1, 2, 3), keepdim=True).expand(-1, 3, 4, 4)


def test_two_shades_become_those_of_the_pictures():
    """A mean alone would be found by one shade: it is the repulsion that keeps two."""
    model, made = TwoPoints(), objective(Angle(), compare_with="data", few_steps=1)
    optimiser, seen = torch.optim.Adam([model.shades], lr=0.03), []
    for step in range(100):
        shade = 0.6 * torch.randn(64, 1, 1, 1, generator=generator("shade", step)).sign()
        batch = pictures(model, shade.expand(-1, *model.latent_shape()))
        loss = made.loss(model, batch, tools_of(model=model, rng=generator("noise", step)))
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        seen.append(float(loss.terms["mmd"]))
    assert seen[0] > 3 and abs(sum(seen[-20:])) / 20 < 0.05
    torch.testing.assert_close(model.shades.detach(), torch.tensor([0.0, 0.6], dtype=torch.float64), rtol=0, atol=0.05)


def test_how_it_is_to_be_drawn_is_written_down():
    made = objective(guidance=[{"rescale": 0.7}])
    facts = {name: json.loads(told) for name, told in made.facts().items()}
    assert facts["few_steps"] == {"steps": 3, "scheduler": "model"}
    assert facts["distilled_guidance"] == {"cfg_scale": 3.0, "guidance": [{"rescale": 0.7}]}

    class Sampled(Drawing):
        def samplers(self):
            return "ddim", "euler"

    made.check(Sampled(), None)
    assert json.loads(made.facts()["few_steps"]) == {"steps": 3, "scheduler": "ddim"}


@pytest.mark.parametrize(
    ("options", "model", "told"),
    [
        ({}, TinyVideo, "draws clips"),
        ({"features": "no/such-clip-folder"}, Drawing, "no/such-clip-folder"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_run(options, model, told):
    with pytest.raises(UserError, match=told):
        build(Config(**options)).check(model(), None)


def test_sets_that_have_no_pairs_are_refused():
    with pytest.raises(ValueError, match="micro_batch would tear apart"):
        Config(compare_with="data", micro_batch=2)
    model = moved()
    with pytest.raises(UserError, match=r"raise train\.batch_size"):
        objective(compare_with="data").loss(model, pictures(model, torch.zeros(1, *model.latent_shape())), lent(model))
