"""A canvas of regions: how their predictions are blended, what each is told, and what is refused."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_model

from visiontune.core import Request
from visiontune.diffusion.guidance import CFG, guided
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.errors import UserError
from visiontune.guidance import cfg, mixture
from visiontune.guidance._regions import Region
from visiontune.guidance.base import Point, Run
from visiontune.guidance.stack import GuidanceStack
from visiontune.models.pipeline import own_generator

KINDS = ("gaussian", "quartic", "constant")
REQUESTS = [Request(prompt="a red circle", negative="small", seed=seed) for seed in range(2)]
HALVES = [
    {"box": [0, 0, 8, 16], "prompt": "green triangle", "negative": "large", "scale": 5.0},
    {"box": [8, 0, 8, 16], "prompt": "a blue square", "scale": 1.0},
]


@functools.cache
def model(family="sd"):
    made = tiny_model(family)
    made.pipe.scheduler = made.sampler(made.samplers()[0])
    return made


def of(**options):
    return GuidanceStack.of([{"cfg": 3.0}, {"mixture": options}])


def canvas(width, height):
    """A run of a model of 8 pixels a latent."""
    return Run(
        model=SimpleNamespace(source="stub", downsample=8, unit=8), shape=(4, height // 8, width // 8), prompts=()
    )


def at(stack, made=None, cells=8):
    made = made or model()
    x = torch.randn(2, made.latent_channels, cells, cells, generator=torch.Generator().manual_seed(1))
    cond, uncond = made.embed(["a red circle"] * 2), made.embed(["small"] * 2, negative=True)
    with torch.no_grad():
        return x, guided(made, x, torch.tensor([600, 300]), cond, uncond, stack)


@pytest.mark.parametrize("weights", KINDS)
def test_regions_are_blended_by_their_share_of_all_weights(weights):
    term = mixture.Config(tile=512, overlap=256, weights=weights, background=0.5)
    run = canvas(1024, 512)
    regions = [Region(box=(0, 0, 1024, 512)), *(Region(box=(left, 0, 512, 512)) for left in (0, 256, 512))]
    assert [region.box for region in term._all(run)] == [region.box for region in regions]
    generator = torch.Generator().manual_seed(0)
    predictions = [torch.randn(2, 4, 64, wide, generator=generator, dtype=torch.float64) for wide in (128, 64, 64, 64)]
    place = (torch.arange(64, dtype=torch.float64) - 31.5) / 64
    profile = {
        "gaussian": (-place.square() / 0.02).exp(),
        "quartic": 15 / 16 * (1 - (place / (31.5 / 64) * 0.995).square()).square(),
        "constant": torch.ones(64, dtype=torch.float64),
    }[weights]
    above, below = torch.zeros(2, 4, 64, 128, dtype=torch.float64), torch.zeros(64, 128, dtype=torch.float64)
    whole = torch.full((64, 128), 0.5, dtype=torch.float64)
    tiles = [(slice(start, start + 64), torch.outer(profile, profile)) for start in (0, 32, 64)]
    for (columns, weight), e in zip([(slice(0, 128), whole), *tiles], predictions, strict=True):
        above[..., columns] += weight * e
        below[..., columns] += weight
    point = Point(x=torch.zeros_like(above), t=torch.zeros(2), levels=[0.5, 0.5], schedule=None, run=run)
    torch.testing.assert_close(term.blend(predictions, point), above / below, rtol=0, atol=1e-12)
    # What is rounded to half precision still is 1 where a corner is alone, and a whole in all.
    low = replace(point, x=point.x.half(), memory={})
    alone = mixture.Config(tile=512, overlap=256, weights=weights)
    ones = alone.blend([torch.ones(2, 4, 64, 64).half()] * 3, low)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=2e-3)
    assert (ones[..., 0] == 1).all()


@pytest.mark.parametrize("weights", KINDS)
def test_one_region_is_the_whole_and_two_are_one(weights):
    whole = {"box": [0, 0, 16, 16]}
    _, plain = at(CFG(scale=3.0))
    assert torch.equal(at(of(regions=[whole], weights=weights))[1], plain)
    asked = of(regions=[{**whole, "prompt": "a red circle", "negative": "small"}] * 2, weights=weights)
    torch.testing.assert_close(at(asked)[1], plain, rtol=0, atol=1e-6)
    request, stack = REQUESTS[:1], of(regions=[whole], weights=weights)
    one, other = (model().draw(request, steps=2, guidance=given) for given in (stack, CFG(scale=3.0)))
    np.testing.assert_array_equal(one, other)


def test_every_region_has_its_own_prompts_and_scale():
    made, stack = model(), of(regions=HALVES, weights="constant")
    x, found = at(stack)
    t, large = torch.tensor([600, 300]), made.embed(["large"] * 2, negative=True)
    with torch.no_grad():
        green, blue = (made.embed([text] * 2) for text in ("green triangle", "a blue square"))
        left = guided(made, x[..., :4], t, green, large, CFG(scale=5.0))
        right = made.predict(x[..., 4:], t, blue)
    torch.testing.assert_close(found, torch.cat([left, right], dim=-1), rtol=0, atol=1e-5)
    # Where a region is not guided, it costs one call and not two.
    assert stack.plan(made, 2).rows == (3, 3)
    assert of(regions=HALVES, window=[0.4, 1.0]).plan(made, 2).rows == (3, 2)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_larger_canvas_is_made_of_tiles(family):
    """Of the prompt of each picture, in the stock pipeline as in rollouts."""
    made = model(family)
    requests = [REQUESTS[0], Request(prompt="green triangle", negative="large", seed=3)]
    stack = of(tile=16, overlap=8, background=0.1)
    assert stack.plan(made, 2, (24, 32)).rows == (2 * 7, 2 * 7)
    pictures = made.draw(requests, steps=2, guidance=stack, size=(24, 32))
    noise = torch.stack([torch.randn(made.latent_shape(24, 32), generator=own_generator(one)) for one in requests])
    cond = made.embed([one.prompt for one in requests])
    uncond = made.embed([one.negative for one in requests], negative=True)
    with torch.no_grad():
        final = rollout(made, cond, uncond=uncond, guidance=stack, chain=2, start=Start(latents=noise)).final
        ours = (made.decode(final) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pictures, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("crops", "left", "right"),
    [(False, [16, 8, 0, 0, 16, 8], [16, 8, 0, 0, 16, 8]), (True, [16, 16, 0, 0, 16, 8], [16, 16, 0, 8, 16, 8])],
)
def test_sdxl_is_told_the_size_of_every_region(crops, left, right):
    made, told = model("sdxl"), []

    def note(module, args, kwargs):
        told.append(kwargs["added_cond_kwargs"]["time_ids"].tolist())

    handle = made.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        # Of a prompt of its own, and of the picture's, on the stock pipeline.
        regions = [{"box": [0, 0, 8, 16], "prompt": "green triangle"}, [8, 0, 8, 16]]
        made.draw(REQUESTS[:1], steps=1, guidance=of(regions=regions, crops=crops, background=1.0))
    finally:
        handle.remove()
    # The pipeline's own call, which the regions take the place of, comes first.
    assert told[1:] == [[[16, 16, 0, 0, 16, 16]] * 2, [left] * 2, [right] * 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "mixture has nothing to mix: give regions, tile or background"),
        ({"tile": 16, "overlap": 16}, "overlap 16 must be smaller than tile, which is 16"),
        ({"tile": 16, "scale": 0.5}, "scale is 1 or 0, and schedule constant"),
        ({"regions": [[0, 0, 8, 0]]}, r"a region needs a width and a height, not \[0, 0, 8, 0\]"),
        ({"regions": [[0, 0, 12, 16], [8, 0, 8, 16]]}, "region .0, 0, 12, 16. is off the grid of 'tiny-sd': take mult"),
        ({"regions": [[0, 0, 16, 24]]}, "region .0, 0, 16, 24. reaches out of the canvas of 16x16 pixels"),
        ({"regions": [[0, 0, 8, 16], [8, 8, 8, 8]]}, r"no region covers the canvas of 16x16 pixels at \[8, 0\]"),
        ({"tile": 16, "window": [0.2, 0.21]}, "mixture acts at none of the steps"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(options, message):
    with pytest.raises(UserError, match=message):
        of(**options).plan(model(), 2)
    with pytest.raises(UserError, match=message):
        model().draw(REQUESTS[:1], steps=2, guidance=of(**options))


def test_what_a_canvas_needs_of_its_stack_and_pipeline_is_said():
    made, whole = model(), {"box": [0, 0, 16, 16], "scale": 2.0}
    with pytest.raises(UserError, match="gives regions scales of their own, and the stack has no base: put cfg"):
        GuidanceStack.of([{"mixture": {"regions": [whole]}}]).plan(made, 2)
    with pytest.raises(UserError, match="attach the stack to a model"), of(tile=16).attach(made.pipe):
        made.pipe("a red circle", num_inference_steps=1, height=16, width=16)
    cond = replace(made.embed(["a red circle"]), references=[(torch.zeros(4, 8, 8),)])
    with pytest.raises(UserError, match="no place for pictures beside the prompt"):
        guided(
            made,
            torch.zeros(1, 4, 8, 8),
            torch.tensor([5]),
            cond,
            cond,
            GuidanceStack([cfg.Config(scale=2.0), mixture.Config(tile=16)]),
        )
