"""Pictures beside the prompt: how many a model reads, how rows with others share a batch, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import CFG
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.errors import UserError
from visiontune.models._reading import Reads, apart

KONTEXT, FILL = Reads(most=1), Reads(least=1, most=1, mask=True, channels=True)
SEVERAL = Reads(least=1, most=None)


def picture(width=20, height=28) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def request(count: int, mask: bool = False) -> Request:
    return Request(prompt="a", pictures=(picture(),) * count, mask=picture().convert("L") if mask else None)


@pytest.mark.parametrize(
    ("reads", "asked", "message"),
    [
        (Reads(), request(1), "reads no pictures: leave them out"),
        (Reads(), request(0, mask=True), "reads no pictures: leave them out"),
        (KONTEXT, request(2), "reads 1 picture beside each prompt, not 2: leave out the others"),
        (KONTEXT, request(1, mask=True), "reads no mask: leave it out"),
        (FILL, request(1), r"reads a picture and a mask beside each prompt: name their files by pictures= and mask="),
        (
            FILL,
            request(0, mask=True),
            r"reads a picture and a mask beside each prompt: name their files by pictures= and mask=",
        ),
        (SEVERAL, request(0), r"reads a picture beside each prompt: name their files by pictures="),
    ],
)
def test_other_pictures_than_a_model_reads_are_refused(reads, asked, message):
    with pytest.raises(UserError, match=rf"^model 'mine' {message}[^\n]*$"):
        reads.check("mine", [asked])


def test_what_a_model_reads_is_not_refused():
    for reads, asked in (
        (Reads(), request(0)),
        (KONTEXT, request(0)),
        (KONTEXT, request(1)),
        (FILL, request(1, mask=True)),
        (SEVERAL, request(3)),
    ):
        reads.check("mine", [asked])


def test_rows_that_are_shown_other_pictures_are_predicted_in_groups_and_in_their_order():
    shown = [(torch.zeros(1, 2, 3),), (), (torch.zeros(1, 3, 2),), (torch.ones(1, 2, 3),), ()]
    cond, seen = Condition(tokens=torch.arange(5.0).view(5, 1, 1), references=shown), []

    def predict(x_t, t, cond):
        seen.append(len(x_t))
        return x_t * t.view(-1, 1) + cond.tokens[:, 0]

    x_t, t = torch.arange(10.0, 15.0).view(5, 1).requires_grad_(), torch.arange(1.0, 6.0)
    found = apart(predict, x_t, t, cond)
    assert seen == [2, 2, 1]
    assert torch.equal(found, predict(x_t, t, replace(cond, references=None)))
    found.sum().backward()
    assert torch.equal(x_t.grad, t[:, None])


def test_guidance_shows_the_pictures_to_both_sides_unless_the_other_has_its_own():
    first, second = torch.zeros(1, 2, 3), torch.zeros(1, 3, 2)
    cond, asked = Condition(tokens=torch.zeros(1, 1, 1), references=[(first,)]), []

    def call(x, t, both):
        asked.append([len(row) and tuple(row[0].shape) for row in both.references])
        return x

    for own in (None, [(second,)], [()]):
        uncond = Condition(tokens=torch.ones(1, 1, 1), references=own)
        CFG(scale=2.0)(call, torch.zeros(1, 1), torch.ones(1), torch.ones(1), cond, uncond)
    assert asked == [[(1, 2, 3), (1, 2, 3)], [(1, 3, 2), (1, 2, 3)], [0, (1, 2, 3)]]


def test_a_trajectory_keeps_references_without_their_graph():
    model = tiny_model("flux", edits="kontext")
    cond = model.read([request(1)])
    cond = replace(cond, references=[(cond.references[0][0].requires_grad_() * 2,)])
    made = rollout(model, cond, chain=1, start=Start(generator=torch.Generator().manual_seed(0)))
    (kept,) = made.cond.references[0]
    assert torch.equal(kept, cond.references[0][0]) and not kept.requires_grad


def test_what_is_painted_into_is_the_mean_unless_there_is_a_generator():
    model = tiny_model("flux", edits="fill")
    asked, size = [request(1, mask=True)], (16, 24)
    mean = model.read(asked, size=size).extra["channels"]
    assert torch.equal(mean, model.read(asked, size=size).extra["channels"])
    drawn, again = (
        model.read(asked, size=size, generator=torch.Generator().manual_seed(1)).extra["channels"] for _ in range(2)
    )
    assert torch.equal(drawn, again)
    apart = (drawn - mean).abs().amax((0, 2, 3)) > 0
    assert apart.tolist() == [True] * 16 + [False] * 4
    x_t, cond = torch.zeros(1, 16, 12, 8), model.read(asked, size=size)
    with pytest.raises(ValueError, match="needs channels of a picture and a mask, not those of a picture of another"):
        model.predict(x_t, torch.tensor(500.0), cond)
    with pytest.raises(ValueError, match="not none"):
        model.predict(x_t, torch.tensor(500.0), model.embed(["a"]))


@pytest.mark.parametrize("reads", [Reads(), KONTEXT, FILL])
def test_a_network_is_given_pictures_in_the_form_that_it_reads(reads):
    words = Condition(tokens=torch.zeros(1, 1, 1))
    shown = replace(words, references=[(torch.zeros(4, 8, 8),)])
    wide = replace(words, extra={"channels": torch.zeros(1, 4, 8, 8)})
    for cond, taken, what in (
        (words, True, ""),
        (shown, reads == KONTEXT, "references"),
        (wide, reads.mask, "channels"),
    ):
        if taken:
            reads.check_condition("mine", cond)
            continue
        with pytest.raises(ValueError, match=f"^model 'mine' reads no {what}"):
            reads.check_condition("mine", cond)


def test_a_model_that_reads_none_is_neither_shown_pictures_nor_draws_with_them():
    model = tiny_model("sd")
    cond = replace(model.embed(["a"]), references=[(torch.zeros(4, 8, 8),)])
    with pytest.raises(ValueError, match="'tiny-sd' reads no references"):
        model.predict(torch.zeros(1, 4, 8, 8), torch.tensor(500), cond)
    with pytest.raises(UserError, match="'tiny-sd' reads no pictures"):
        model.draw([request(1)], steps=1, guidance=model.guidance(1.0))


def test_words_that_are_read_beside_a_picture_are_not_embedded_alone():
    model = tiny_model("qwen_image", edits="one")
    for way in (lambda: model.embed(["a"]), lambda: model.unconditional(1)):
        with pytest.raises(UserError, match=r"reads a prompt beside its picture: make its conditions by read\(\)"):
            way()


def test_a_picture_that_the_pipeline_does_not_take_is_refused_in_one_line():
    model = tiny_model("flux2")
    with pytest.raises(
        UserError, match=r"^'tiny-flux2' does not read the picture \(Image too small[^\n]*give another$"
    ):
        model.read([Request(prompt="a", pictures=(picture(8, 40),))])
