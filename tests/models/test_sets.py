"""Pictures of a set that read one another: identities of coupled attention, and how sets are drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, tiny_model
from torch.nn.functional import scaled_dot_product_attention

from visiontune.core import Request
from visiontune.errors import UserError
from visiontune.models._coupled import Coupling, fold, unfold
from visiontune.models.expand import expand_input
from visiontune.objectives.base import generator


@pytest.fixture
def model():
    return tiny_model("sd", edits="inpaint")


def rows_of(model, count: int, seed: int = 0):
    """Noisy latents, timesteps and conditions of rows that all differ, the odd ones references."""
    rng = generator("rows", seed)
    shape = model.latent_shape()
    x, hidden = (torch.randn(count, *shape, generator=rng) for _ in range(2))
    masks = torch.ones(count, 1, SIZE, SIZE)
    masks[1::2] = 0
    words = model.embed([["a red circle", "a blue square", "a green star"][i % 3] for i in range(count)])
    return x, torch.full((count,), 400), replace(words, extra={"channels": model.channels(hidden, masks)})


def predicted(model, sizes, x, t, cond):
    with torch.no_grad(), model.couple().of(sizes):
        return model.predict(x, t, cond)


def alike(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_sets_of_one_are_the_model_as_it_was(model):
    rows = rows_of(model, 3)
    with torch.no_grad():
        before = model.predict(*rows)
    assert torch.equal(predicted(model, (1,), *rows), before)
    assert torch.equal(predicted(model, (1, 1, 1), *rows), before)
    assert (predicted(model, (3,), *rows) - before).abs().max() > 1e-3
    model.uncouple()
    assert torch.equal(model.predict(*rows), before) and model.paints


def test_permuted_pictures_are_permuted_predictions(model):
    x, t, cond = rows_of(model, 3)
    order = torch.tensor([2, 0, 1])
    alike(predicted(model, (3,), x[order], t, cond[order]), predicted(model, (3,), x, t, cond)[order])


def test_a_set_of_one_picture_twice_is_that_picture_alone(model):
    x, t, cond = rows_of(model, 1)
    twice = torch.tensor([0, 0])
    found, alone = predicted(model, (2,), x[twice], t[twice], cond[twice]), predicted(model, (1,), x, t, cond)
    alike(found, alone.expand_as(found))


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_sets_of_several_sizes_are_each_as_by_itself(model, precision):
    x, t, cond = rows_of(model, 6)
    model = model.at(precision)
    cuts = [slice(0, 3), slice(3, 4), slice(4, 6)]
    alone = [predicted(model, (cut.stop - cut.start,), x[cut], t[cut], cond[cut]) for cut in cuts]
    found = predicted(model, (3, 1, 2), x, t, cond)
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=2e-6 if precision is None else 0.05)
    with model.training():  # attention by plain products, in bfloat16 on a CPU
        torch.testing.assert_close(predicted(model, (3, 1, 2), x, t, cond), found, rtol=0, atol=0.05)
    # Further rows are further sets, as guidance has them.
    again = predicted(model, (3, 1, 2), torch.cat([x, x]), torch.cat([t, t]), type(cond).cat([cond, cond]))
    torch.testing.assert_close(again, torch.cat([found, found]), rtol=0, atol=2e-6 if precision is None else 0.05)


def test_folded_attention_is_that_of_the_whole_set():
    rng = generator("fold")
    x, sizes = torch.randn(5, 4, 8, generator=rng, dtype=torch.float64), (2, 3)
    folded, mask = fold(x, sizes)
    assert torch.equal(unfold(folded, sizes), x) and mask is not None and mask.shape == (2, 1, 12)
    found = unfold(scaled_dot_product_attention(folded, folded, folded, mask), sizes)
    for cut in (slice(0, 2), slice(2, 5)):
        whole = x[cut].reshape(-1, 8)
        weights = (whole @ whole.T / 8**0.5).softmax(-1)
        torch.testing.assert_close(found[cut].reshape(-1, 8), weights @ whole)
    assert fold(x[:4], (2,))[1] is None  # so that fused kernels need no mask
    with pytest.raises(ValueError, match="5 rows are not some times sets of 2"):
        fold(x, (2,))


def test_checkpointed_blocks_give_the_same_gradient(model):
    x, t, cond = rows_of(model, 3)

    def gradient():
        latents = x.clone().requires_grad_()
        model.couple().sizes = (2, 1)
        model.predict(latents, t, cond)[:1].square().sum().backward()
        return latents.grad

    plain = gradient()
    assert plain[1].any() and not plain[2].any()
    model.denoiser.train()
    model.denoiser.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain)


def test_an_expanded_model_is_told_nothing_by_its_references_yet():
    model = expand_input(tiny_model("sd"))
    x, t, cond = rows_of(model, 2)
    other = replace(cond, extra={"channels": torch.randn_like(cond.extra["channels"])})
    assert torch.equal(predicted(model, (2,), x, t, cond), predicted(model, (2,), x, t, other))


# --------------------------------------------------------------------------------------------------------- drawing


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def drawn(model, *requests, scale: float = 3.0):
    return model.draw(list(requests), steps=2, guidance=model.guidance(scale))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_set_is_drawn_by_the_stock_pipeline(family):
    """One call of it, with the new picture painted whole and its references not at all."""
    model = tiny_model(family, edits="inpaint")
    shown, asked = (picture(1), picture(2)), Request(prompt="a red circle", seed=3)
    whole = {"pictures": (Image.new("RGB", (SIZE, SIZE), (128, 128, 128)),), "mask": Image.new("L", (SIZE, SIZE), 255)}
    rows = [replace(asked, **whole)]
    rows += [
        Request(prompt="", seed=4 + i, pictures=(p,), mask=Image.new("L", (SIZE, SIZE))) for i, p in enumerate(shown)
    ]
    guidance = model.guidance(3.0)
    painted = drawn(model, rows[0])
    itself = [m for n, m in model.denoiser.named_modules() if n.endswith("attn1")]
    coupling = Coupling(itself)
    with coupling.of((3,)):
        stock = model._draw(rows, (SIZE, SIZE), 2, model._stock(guidance, rows))[0]
    coupling.undo()
    model.couple()
    found = drawn(model, replace(asked, pictures=shown), asked)
    np.testing.assert_allclose(found[0], stock, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[1], painted[0], rtol=0, atol=1e-5)  # without references as without coupling
    other = drawn(model, replace(asked, pictures=(picture(5), picture(2))))
    assert np.abs(other[0] - found[0]).max() > 3e-5


def test_who_cannot_draw_sets_is_refused(model):
    with pytest.raises(UserError, match="visiontune expand tiny-sd FOLDER"):
        tiny_model("sd").couple()
    model.couple()
    with pytest.raises(UserError, match="reads no mask"):
        drawn(model, Request(prompt="a", pictures=(picture(1),), mask=Image.new("L", (SIZE, SIZE), 255)))
    with pytest.raises(UserError, match="which its stock pipeline does alone"):
        model.read([Request(prompt="a")])
