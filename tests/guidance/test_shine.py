"""SHINE: the pull, the masks, where a run starts and what it keeps, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from tiny import tiny_model

from visiontune import adapters
from visiontune.core import Request
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Keep, Start, rollout
from visiontune.errors import UserError
from visiontune.guidance import cfg, magicmix, seg, shine
from visiontune.guidance._beneath import towards
from visiontune.guidance._objects import bounded, component, drawn
from visiontune.guidance._regions import Region
from visiontune.guidance.base import Point
from visiontune.guidance.mixture import Config as Mixture
from visiontune.guidance.stack import GuidanceStack

PICTURE = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
PROMPT, STEPS = "a red circle above a blue square", 5
FIRST = 1  # of the steps, which stand at 0.8, 0.6, ..., the first at or below 0.7
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module")
def model():
    made = tiny_model("sd")
    made.pipe.scheduler = made.sampler("ddim")
    found = adapters.attach(made.of("denoiser"), "lora", targets="attention", presets=made.presets()).eval()
    with torch.no_grad():
        for number, parameter in enumerate(found.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return made


def term(**options):
    given = {"picture": PICTURE, "mask": (0, 0, 8, 8), "subject": "circle", "prompt": PROMPT, "cfg_scale": 1.0}
    return shine.Config(**{**given, **options})


def rolled(made, *terms, chain=STEPS, rows=2):
    noise = torch.randn(rows, *made.latent_shape(), generator=torch.Generator().manual_seed(3))
    options = {"chain": chain, "start": Start(latents=noise), "keep": Keep(history=True)}
    with torch.no_grad():
        found = rollout(made, made.embed([PROMPT] * rows), guidance=GuidanceStack(terms), **options)
        clean = made.encode(torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None] / 127.5 - 1, sample=False)
    return found, clean, noise


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "x0"])
def test_the_pull_is_the_difference_of_clean_pictures_over_sigma(prediction):
    """Which is the paper's difference of velocities of flow."""
    squared = torch.linspace(0.99, 0.01, 1001, dtype=torch.float64)
    levels = {"alphas": squared.sqrt(), "sigmas": (1 - squared).sqrt(), "num_train_timesteps": 1000}
    schedule = Schedule.flow() if prediction == "flow" else Schedule(prediction=prediction, **levels)
    t = torch.tensor([400, 700])
    x, one, other = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    point = Point(x=x, t=t, levels=[0.4, 0.7], schedule=schedule)
    _, sigma = schedule.levels(t, 4)
    expected = (schedule.to_x_0(one, x, t) - schedule.to_x_0(other, x, t)) / sigma
    found = towards(one - other, point)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if prediction == "flow":
        torch.testing.assert_close(found, other - one, **EXACT)


def test_the_object_is_the_largest_part_of_what_is_attended_to():
    values = np.zeros((6, 9))
    values[1:3, 1:3], values[4, 7], values[0, 8] = 1.0, 0.9, 0.39
    assert component(values, 0.4, 1).sum() == 4
    grown = component(values, 0.4, 3)
    np.testing.assert_array_equal(grown, ndimage.binary_dilation(values == 1, np.ones((3, 3))))
    assert component(values, 0.95, 1).sum() == 4 and not component(np.ones((3, 3)), 0.4, 3).any()
    corner = np.zeros((6, 9), bool)
    corner[1, 2] = corner[3, 1] = True
    box = bounded(corner)
    assert box[1:4, 1:3].all() and box.sum() == 6 and not bounded(np.zeros((2, 2), bool)).any()


def test_masks_are_the_object_then_its_box_and_the_users():
    box = torch.zeros(1, 1, 8, 8)
    box[..., 4:, 4:] = 1
    attention = torch.zeros(3, 4, 4)
    attention[0, 1, 2] = attention[0, 2, 2] = 1  # an L at the corner of the box
    attention[0, 1, 1] = 1
    attention[1] = 0.5  # flat
    attention[2, 0, 0] = 1  # elsewhere
    options = {"threshold": 0.4, "dilation": 1}
    tight = drawn(attention, box, tight=True, **options)
    expected = torch.zeros(8, 8)
    expected[2:4, 2:6] = expected[4:6, 4:6] = 1
    assert torch.equal(tight[0, 0], expected)
    wide = drawn(attention, box, tight=False, **options)
    expected = torch.zeros(8, 8)
    expected[2:6, 2:6] = expected[4:, 4:] = 1
    assert torch.equal(wide[0, 0], expected)
    for row in (1, 2):
        assert torch.equal(tight[row], box[0]) and torch.equal(wide[row], box[0])


def test_a_run_starts_from_the_picture_and_keeps_it_outside_of_what_is_drawn(model, monkeypatch):
    masks = []

    def noted(*args, **options):
        masks.append((drawn(*args, **options), options["tight"]))
        return masks[-1][0]

    monkeypatch.setattr(shine, "drawn", noted)
    options = {"start": 0.7, "pull": [0.05], "threshold": 0.5, "dilation": 1}
    found, clean, noise = rolled(model, cfg.Config(scale=3.0), term(beyond=True, **options))
    plain = rolled(model, cfg.Config(scale=3.0), term(**options))[0]
    assert [tight for _, tight in masks] == [True, True, False, False, True, True]
    box = torch.zeros(2, 1, 8, 8)
    box[..., :4, :4] = 1
    partial, inside = 0, [box, *(mask for mask, _ in masks[:4])]
    for i, t in enumerate([*found.timesteps.tolist(), -1]):
        known = model.schedule.add_noise(clean.expand_as(noise), noise, torch.tensor([t, t]))
        at = found.latents[:, i]
        if i < FIRST:
            assert torch.equal(at, known)
            continue
        mask = inside[i - FIRST].expand_as(at) == 1
        partial += bool(mask.float().mean() < 1)
        assert torch.equal(at[~mask], known[~mask]) and (at - known)[mask].abs().max() > 1e-4
        # Without what is beyond it, the box alone is drawn from the third step on.
        if i < FIRST + 3:
            assert torch.equal(plain.latents[:, i], at)
        else:
            assert torch.equal(plain.latents[:, i][box.expand_as(at) == 0], known[box.expand_as(at) == 0])
    assert partial > 1


def test_nothing_pulls_where_base_and_adapted_model_say_the_same(model):
    free, pulled = (rolled(model, term(start=0.7, pull=pull))[0].latents for pull in ([0.0], [0.05]))
    assert (free - pulled).abs().max() > 1e-4
    same = {"source": f"{PROMPT} ", "iterations": 1, "start": 0.7}  # read as the prompt is
    with adapters.attached(model.of("denoiser"))["default"].disable():
        free, pulled = (rolled(model, term(pull=pull, **same))[0].latents for pull in ([0.0], [0.05]))
    assert torch.equal(free, pulled)


def test_with_everything_drawn_it_is_image_to_image(model):
    whole = term(pull=[], start=0.7, mask=(0, 0, 16, 16), threshold=0.0, dilation=99)
    plain = magicmix.Config(picture=PICTURE, k_max=0.7, k_min=0.7)
    found, expected = (rolled(model, cfg.Config(scale=3.0), one)[0] for one in (whole, plain))
    assert torch.equal(found.latents, expected.latents)


def test_the_pull_is_the_equation(model):
    """Twice, from predictions that are made here."""
    found, plain = (rolled(model, term(pull=pull, start=0.7))[0] for pull in ([0.05], []))
    z = start = plain.latents[:, FIRST]
    t, cond = found.timesteps[FIRST].expand(2), model.embed([PROMPT] * 2)
    alpha, _ = model.schedule.levels(t, 4)
    box = torch.zeros(1, 1, 8, 8)
    box[..., :4, :4] = 1
    with torch.no_grad():
        with adapters.attached(model.of("denoiser"))["default"].disable():
            anchor = model.predict(start, t, cond)
        for _ in range(2):
            z = z - 0.05 * box * (model.predict(z, t, cond) - anchor) / alpha.float()
    torch.testing.assert_close(found.latents[:, FIRST], z, rtol=0, atol=1e-6)


def test_it_costs_what_the_authors_count():
    """20 steps from the seventh on: 14, twice 3 for the pull, and 13 with blurred queries."""
    made = tiny_model("flux")
    levels = (made.chain(20, made.latent_shape())[0] / 1000).tolist()
    blurred = seg.Config(scale=0.7, sigma=10, layers=["transformer_blocks"], window=(0.0, levels[6] - 1e-4))
    stack = GuidanceStack([term(start=levels[6], source="a circle"), blurred])
    assert sum(stack.plan(made, 20).rows) == 14 + 6 + 13
    free = GuidanceStack([term(start=levels[6], pull=[]), seg.Config(scale=0.0)])
    assert sum(free.plan(made, 20).rows) == 14
    names = seg.Config(layers=["transformer_blocks"])
    chosen = [*shine.Network.of_model(made).attention(names.layers, "seg")]
    assert chosen and not any(name.startswith("single") for name in chosen)


def test_what_it_cannot_do_is_said(model):
    def refused(message, *terms, made=model):
        with pytest.raises(UserError, match=message):
            GuidanceStack(terms).plan(made, STEPS)

    refused(r"shine: mask \[8, 8, 9, 4\] ends outside of the 16x16 that are drawn", term(mask=(8, 8, 9, 4)))
    refused("shine: mask needs a width and a height", term(mask=(0, 0, 0, 4)))
    refused("shine: the mask is black everywhere", term(mask=Image.new("L", (16, 16))))
    refused("'star' is not among the words that are read", term(subject="star"))
    refused("no layer of 'tiny-sd' is called 'up_blocks.7'", term(layers=["up_blocks.7"]))
    refused(r"shine begins a run.*move the upper end of its window", term(window=(0.0, 0.5)))
    refused(r"shine begins a run.*or its start, there", term(start=1e-6))
    refused("which has none: attach them, give a source, or set its pull", term(), made=tiny_model("flux"))
    refused("has no layers of its own: leave shine out", term(), made=tiny_model("z_image"))
    refused("shine and magicmix both say where a run starts", term(), magicmix.Config(picture=PICTURE))
    with pytest.raises(UserError, match="picture has 32x16 pixels, which is another ratio"):
        rolled(model, term(picture=PICTURE.resize((32, 16))))
    with pytest.raises(UserError, match="the prompts of the pictures are not known here"):
        rolled(model, term(prompt=None))
    request = Request(prompt=PROMPT, seed=0)
    with pytest.raises(UserError, match="attach the stack to a model"), GuidanceStack([term()]).attach(model.pipe):
        model.pipe(PROMPT, num_inference_steps=1, height=16, width=16, guidance_scale=1.0)
    regions = Mixture(regions=[Region(box=(0, 0, 16, 8)), Region(box=(0, 8, 16, 8))])
    with pytest.raises(UserError, match="shine draws in whole pictures: leave out terms that draw in regions"):
        model.draw([request], steps=STEPS, guidance=GuidanceStack([term(), regions]))
