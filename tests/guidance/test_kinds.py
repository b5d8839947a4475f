"""Kinds of terms that edit latents, pull, shape the network and cut the canvas: what each is given, in rollouts and on
stock pipelines alike.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny import tiny_model

from visiontune.core import Request
from visiontune.diffusion.trajectory import Start, Window, rollout
from visiontune.errors import UserError
from visiontune.guidance import cfg
from visiontune.guidance._taps import replaced
from visiontune.guidance.base import Canvas, Edit, Part, Pull, Shaping
from visiontune.guidance.stack import GuidanceStack
from visiontune.models.pipeline import own_generator

PROMPTS = ["a red circle above a blue square", "green triangle"]
REQUESTS = [Request(prompt=prompt, negative="small", seed=seed) for seed, prompt in enumerate(PROMPTS)]
STEPS = 3
LAST = ("conv_out", "proj_out", "all_final_layer.2-1.linear")
FAMILIES = ["sd", "flux", "pixart", "z_image"]


@functools.cache
def opened(family):
    made = tiny_model(family)
    if family == "amused":
        return made
    made.pipe.scheduler = made.sampler("ddim" if "ddim" in made.samplers() else made.samplers()[0])
    return made


@pytest.fixture(params=FAMILIES)
def model(request):
    return opened(request.param)


@dataclass(frozen=True, kw_only=True)
class Shift(Edit):
    """Adds the level, and notes where it was."""

    scale: float = 0.1

    def edit(self, x, s, point):
        point.memory.setdefault("levels", []).append(round(point.levels[0], 4))
        return x + s * point.levels[0] + 0.01 * len(point.memory["levels"])


@dataclass(frozen=True, kw_only=True)
class Overwrite(Edit):
    """The latents are what they were at the start, down to a level."""

    scale: float = 1.0

    def edit(self, x, s, point):
        if point.memory.get("done"):
            return x
        point.memory["done"] = not self.overwrites(point.levels[0])
        return point.memory.setdefault("start", x)

    def overwrites(self, start):
        return start > 0.4


@dataclass(frozen=True, kw_only=True)
class Flipped(Pull):
    """What is predicted of the mirrored latents for another prompt, less what is for the negative one."""

    ROWS = 1
    NEGATIVE = True
    scale: float = 0.5

    def pull(self, p, u, s, sides, point):
        model = point.run.modelled(self.name)
        cond = point.memory.setdefault("cond", model.embed(["a yellow star"] * len(p)))
        return s * (sides.at(point.x.flip(-1), cond).flip(-1) - u)


@dataclass(frozen=True, kw_only=True)
class Again(Pull):
    """What is predicted for the prompt of the same latents, less what that is after all."""

    ROWS = 1
    scale: float = 1.0

    def pull(self, p, u, s, sides, point):
        return s * (sides.at(point.x) - p)


@dataclass(frozen=True, kw_only=True)
class Halved(Shaping):
    """The network's output is halved, in every call of it, which it counts."""

    scale: float = 0.5

    @contextmanager
    def shaping(self, network, arguments, point, side):
        point.memory.setdefault("sides", []).append(side)

        def make(name, forward):
            return lambda *args, **kwargs: forward(*args, **kwargs) * self.scale

        outs = {name: module for name, module in network.denoiser.named_modules() if name in LAST}
        with replaced(outs, make):
            yield


@dataclass(frozen=True, kw_only=True)
class Halves(Canvas):
    """The left and the right half, each with prompts of its own."""

    scale: float = 1.0
    texts: tuple[str, ...] = ("a red circle", "a blue square")

    def scales(self, run):
        return [None] * len(self.texts)

    def parts(self, sides, point):
        model, rows = point.run.modelled(self.name), len(point.x)
        return [
            Part(x=x, cond=model.embed([text] * rows), uncond=model.embed(["small"] * rows, negative=True))
            for x, text in zip(point.x.chunk(len(self.texts), dim=-1), self.texts, strict=True)
        ]

    def blend(self, predictions, point):
        return torch.cat(list(predictions), dim=-1)


def noise_of(made):
    return torch.stack([torch.randn(made.latent_shape(), generator=own_generator(one)) for one in REQUESTS])


def rolled(made, stack):
    cond, uncond = made.embed(PROMPTS), made.embed(["small"] * 2, negative=True)
    with torch.no_grad():
        found = rollout(made, cond, uncond=uncond, guidance=stack, chain=STEPS, start=Start(latents=noise_of(made)))
        return (made.decode(found.final) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def drawn(made, *terms):
    return made.draw(REQUESTS, steps=STEPS, guidance=GuidanceStack([cfg.Config(scale=3.0), *terms]))


@pytest.mark.parametrize("kind", [Shift, Overwrite, Flipped, Again, Halved, Halves])
def test_a_term_of_every_kind_does_the_same_in_rollouts_and_in_stock_pipelines(model, kind):
    rows, term = [], kind()

    def make(name, forward):
        def noted(*args, **kwargs):
            rows.append(len(args[0] if args else kwargs[model.STRUCTURE.noisy]))
            return forward(*args, **kwargs)

        noted.__wrapped__ = forward
        return noted

    stack = GuidanceStack([cfg.Config(scale=3.0), term])
    with replaced({"": model.denoiser}, make):
        pictures = drawn(model, term)
        seen = sum(rows)
        ours = rolled(model, stack)
    assert seen == len(REQUESTS) * sum(stack.plan(model, STEPS).rows)
    np.testing.assert_allclose(pictures, ours, rtol=0, atol=1e-5)
    assert np.abs(pictures - drawn(model)).max() > 1e-3
    assert "step" not in vars(model.pipe.scheduler)


def test_what_kinds_cannot_do_is_said():
    made = opened("sd")
    edited = GuidanceStack([Shift()])
    with pytest.raises(UserError, match="edits what they lead to"):
        rollout(made, made.embed(PROMPTS), guidance=edited, window=Window(steps=1, deferred=True))
    with pytest.raises(UserError, match="the sampler DPMSolverMultistepScheduler keeps something"):
        made.draw(REQUESTS, steps=STEPS, guidance=edited, sampler="dpm++")
    with (
        pytest.raises(UserError, match="attach the stack to a model"),
        GuidanceStack([cfg.Config(scale=3.0), Flipped()]).attach(made.pipe),
    ):
        made.pipe(PROMPTS, num_inference_steps=1, height=16, width=16)
    with pytest.raises(UserError, match="test_kinds and test_kinds both say what the canvas is made of"):
        GuidanceStack([Halves(), Halves()])
    with (
        pytest.raises(UserError, match="the pipeline guides by itself, on top of what test_kinds has made"),
        GuidanceStack([Halves()]).attach(made),
    ):
        made.draw(REQUESTS, steps=1, guidance=made.guidance(3.0))
    with pytest.raises(UserError, match="guides latents, and 'tiny-amused' predicts tokens: take cfg"):
        GuidanceStack([Shift()]).plan(opened("amused"), STEPS)
    assert "step" not in vars(made.pipe.scheduler) and "forward" not in vars(made.denoiser)
