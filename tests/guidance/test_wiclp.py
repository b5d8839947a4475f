"""CLP and WiCLP: the projection's equation, whose words it changes and when, its file and its fit."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model

from visiontune.core import Batch
from visiontune.diffusion.guidance import guided
from visiontune.errors import UserError
from visiontune.guidance import cfg, projector, wiclp
from visiontune.guidance._network import Network
from visiontune.guidance.projector import Fitting, TextProjector
from visiontune.guidance.stack import GuidanceStack

PROMPT = "a red circle above a blue square"


@functools.cache
def model(family="sd"):
    made = tiny_model(family)
    made.pipe.scheduler = made.sampler(made.samplers()[0])
    return made


def fitted(width=32, window=3, seed=0):
    g = TextProjector(width, window)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in g.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    return g.requires_grad_(False)


def words(width=32, tokens=9):
    return torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(1))


def test_a_token_is_made_of_those_in_its_window_and_of_zeros_beyond_the_ends():
    g, c = fitted(window=5), words()
    for i in (0, 4, 8):
        own = c[:, i] + g.bias
        for j in range(max(0, i - 2), min(9, i + 3)):
            own = own + c[:, j] @ g.weight[:, :, j - i + 2].T
        torch.testing.assert_close(g(c)[:, i], own, rtol=1e-5, atol=1e-5)
    moved = c.clone()
    moved[:, 4] += 1
    assert ((g(moved) - g(c)).abs().amax((0, 2)) > 0).nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    # A window of one is a linear map of each token by itself.
    clp = fitted(window=1)
    torch.testing.assert_close(clp(c), c + c @ clp.weight[:, :, 0].T + clp.bias, rtol=1e-5, atol=1e-6)
    assert torch.equal(TextProjector(32)(c), c)


def at(*terms, family="sd", t=(600,)):
    made = model(family)
    cond, uncond = made.embed([PROMPT] * len(t)), made.embed(["small"] * len(t), negative=True)
    x = torch.randn(len(t), *made.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return guided(made, x, torch.tensor(t), cond, uncond, GuidanceStack(terms)), x, cond, uncond


@pytest.mark.parametrize(("family", "width"), [("sd", 32), ("sdxl", 64)])
def test_the_prompts_words_alone_are_projected_and_in_the_window_alone(family, width):
    """Rows at two levels of noise, one in the window: CFG of a prediction under projected words there."""
    made, g = model(family), fitted(width)
    found, x, cond, uncond = at(
        cfg.Config(scale=3.0), wiclp.Config(file=g, scale=0.5, window=(0.5, 1.0)), family=family, t=(900, 100)
    )
    tokens = torch.stack([cond.tokens[0] + 0.5 * g.change(cond.tokens)[0], cond.tokens[1]])
    told = replace(cond, tokens=tokens)
    t = torch.tensor([900, 100])
    with torch.no_grad():
        c, u = made.predict(x, t, told), made.predict(x, t, uncond)
    torch.testing.assert_close(found, u + 3 * (c - u), rtol=1e-4, atol=1e-4)
    plain = at(cfg.Config(scale=3.0), family=family, t=(900, 100))[0]
    assert not torch.allclose(found[0], plain[0], atol=1e-3)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-5, atol=1e-5)


def test_a_fresh_projection_and_one_without_strength_leave_the_bits():
    plain = at(cfg.Config(scale=3.0))[0]
    for term in (wiclp.Config(file=TextProjector(32), window=(0, 1)), wiclp.Config(file=fitted(), scale=0.0)):
        assert torch.equal(at(cfg.Config(scale=3.0), term)[0], plain)


def test_a_projection_of_another_width_and_networks_without_such_words_are_refused():
    with pytest.raises(UserError, match="words of 48 numbers, and 'tiny-sd' reads such of 32"):
        wiclp.Config(file=fitted(48)).check(Network.of_model(model()))
    with pytest.raises(UserError, match="leave wiclp out"):
        wiclp.Config(file=fitted()).check(Network.of_model(tiny_model("sd3")))
    with pytest.raises(UserError, match="not 4: take an odd one"):
        Fitting(window=4)


def test_a_file_holds_the_projection_and_what_is_none_is_one_line(tmp_path):
    g = fitted()
    g.about = {"window": "3"}
    again = TextProjector.load(g.save(tmp_path / "g.safetensors"))
    assert again.about["window"] == "3"
    assert torch.equal(again.weight, g.weight) and torch.equal(again.bias, g.bias)
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is no projection"):
        TextProjector.load(tmp_path / "other.safetensors")
    mark = {"visiontune_text_projector": "1"}
    for weight in (torch.zeros(4, 4, 2), torch.zeros(4, 5, 3), torch.full((4, 4, 3), float("nan"))):
        save_file({"weight": weight, "bias": torch.zeros(4)}, tmp_path / "bad.safetensors", mark)
        with pytest.raises(UserError, match="is damaged"):
            TextProjector.load(tmp_path / "bad.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="is damaged"):
        TextProjector.load(tmp_path / "half.safetensors")


def batch(step=0):
    made = model()
    image = torch.randn(2, *made.latent_shape(), generator=torch.Generator().manual_seed(7))
    return Batch(
        prompts=[PROMPT, "a circle"], data={"image": image}, cond=made.embed([PROMPT, "a circle"]),
        weight=torch.tensor([1.0, 0.5]), prior=torch.zeros(2, dtype=torch.bool), ids=["0", "1"],
    )  # fmt: skip


def test_the_first_gradient_moves_every_weight_and_no_other_network():
    g, made = TextProjector(32), model()
    made.main.requires_grad_(False)
    projector.loss_of(made, g, batch(), torch.Generator().manual_seed(0)).backward()
    assert g.weight.grad.abs().amax((1, 2)).min() > 0 and g.bias.grad.abs().min() > 0


def test_a_fit_lowers_the_loss_that_it_is_for():
    made, told = model(), []
    before = [p.clone() for p in made.main.parameters()]
    g = projector.fit(made, batch, Fitting(window=3, steps=40, lr=3e-2), each=lambda step, loss: told.append(loss))
    assert all(torch.equal(a, b) for a, b in zip(made.main.parameters(), before, strict=True))
    assert len(told) == 40 and g.about["window"] == "3" and not g.weight.requires_grad
    start, end = (
        sum(float(projector.loss_of(made, one, batch(), torch.Generator().manual_seed(n))) for n in range(8))
        for one in (TextProjector(32), g)
    )
    assert end < start
