"""FreeCompose: the gradient, what the target's side attends to, and what holds the rest of the picture."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from torch.nn.functional import scaled_dot_product_attention

from visiontune.composition import _delta, as_picture, as_pillow
from visiontune.composition._keys import dropping, sharing
from visiontune.composition.freecompose import Optimisation, appearance, difference, harmonise, redraw, remove
from visiontune.core import Condition
from visiontune.errors import UserError
from visiontune.guidance._features import pictured
from visiontune.guidance._network import Network
from visiontune.guidance._taps import attending, noted, replaced

PICTURE = as_picture(Image.linear_gradient("L").resize((16, 16)).convert("RGB"))
MASK = np.zeros((16, 16))
MASK[:8, 4:12] = 1
FEW = Optimisation(iterations=2, cfg_scale=3.0)


@pytest.fixture(scope="module", params=["sd", "sd3"])
def model(request):
    return tiny_model(request.param)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(model):
    z_0, noise = drawn(1, *model.latent_shape()), drawn(1, *model.latent_shape(), seed=1)
    return z_0 + 0.1 * drawn(1, *model.latent_shape(), seed=2), z_0, torch.tensor([500]), noise


def test_the_gradient_is_a_difference_of_noise_in_one_call_without_a_graph(model):
    z, z_0, t, noise = given(model)
    cond, rows = model.embed(["a red circle", "green triangle"]), []

    def make(name, forward):
        def seen(*args, **kwargs):
            rows.append((len(args[0] if args else kwargs["hidden_states"]), torch.is_grad_enabled()))
            return forward(*args, **kwargs)

        return seen

    with replaced({"": model.denoiser}, make):
        found = difference(model, z.requires_grad_(), z_0, t, noise, cond, 3.0)
    assert rows == [(4, False)] and not found.requires_grad
    expected = []
    for latents, one in ((z.detach(), cond[0]), (z_0, cond[1])):
        x = model.schedule.add_noise(latents, noise, t)
        with torch.no_grad():
            c, u = (model.predict(x, t, told) for told in (one, model.unconditional(1)))
        expected.append(model.schedule.to_eps(u + 3 * (c - u), x, t))
    torch.testing.assert_close(found, expected[0] - expected[1], rtol=0, atol=2e-5)
    same = Condition.cat([cond[0], cond[0]])
    assert not difference(model, z_0, z_0, t, noise, same, 3.0).any()


def test_dropped_keys_are_as_if_masked(model):
    network, x, t = Network.of_model(model), drawn(2, *model.latent_shape()), torch.tensor([500, 500])
    cond, arguments = model.embed(["a red circle", "green triangle"]), {}
    covered = torch.zeros(16, 16)
    covered[:8, :8] = 1

    def attend(name):
        def seen(q, k, v, mask, **call):
            at = pictured(network.words(name, arguments), k.shape[-2])
            side = int((at.stop - at.start) ** 0.5)
            bias = torch.zeros(2, 1, 1, k.shape[-2])
            small = torch.nn.functional.adaptive_avg_pool2d(covered[None, None], side).flatten() > 0.1
            bias[0, ..., at][..., small] = float("-inf")
            return scaled_dot_product_attention(q, k, v, attn_mask=bias, **call)

        return seen

    with torch.no_grad():
        plain = model.predict(x, t, cond)
        with noted(model.denoiser, arguments), attending(network.attention("all", "test"), "test", attend):
            expected = model.predict(x, t, cond)
        with dropping(network, covered.numpy(), 0.1):
            found = model.predict(x, t, cond)
        with dropping(network, np.zeros((16, 16)), 0.1):
            assert torch.equal(model.predict(x, t, cond), plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found[0] - plain[0]).abs().max() > 1e-4
    torch.testing.assert_close(found[1], plain[1], rtol=0, atol=1e-6)
    none = dropping(network, np.ones((16, 16)), 0.1)
    with pytest.raises(UserError, match="the mask leaves layer"), torch.no_grad(), none:
        model.predict(x, t, cond)


def test_shared_keys_are_the_origins(model):
    network, x, t = Network.of_model(model), drawn(2, *model.latent_shape()), torch.tensor([500, 500])
    cond = model.embed(["a red circle", "green triangle"])
    twins, alike = x[[1, 1]], cond[torch.tensor([1, 1])]
    with torch.no_grad():
        plain, same = model.predict(x, t, cond), model.predict(twins, t, alike)
        with sharing(network, 0.0):
            found = model.predict(x, t, cond)
            torch.testing.assert_close(model.predict(twins, t, alike), same, rtol=0, atol=1e-6)
        with sharing(network, 1.0):
            assert torch.equal(model.predict(x, t, cond), plain)
    assert (found[0] - plain[0]).abs().max() > 1e-4
    torch.testing.assert_close(found[1], plain[1], rtol=0, atol=1e-6)


def round_trip(model, picture=PICTURE):
    pixels = torch.from_numpy(2 * picture - 1).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        z_0 = model.encode(pixels, sample=False)
        return z_0, (model.decode(z_0)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).double().numpy()


def test_without_a_step_it_is_the_round_trip_and_without_a_difference_it_stays(model):
    z_0, expected = round_trip(model)
    for how in (Optimisation(iterations=0), Optimisation(iterations=1, lr=0.0)):
        found = remove(model, PICTURE, MASK, how=how)
        np.testing.assert_array_equal(found.picture, expected)
        assert len(found.drift) == how.iterations
    still = harmonise(model, PICTURE, MASK, origin="a circle", target="a circle", how=FEW)
    torch.testing.assert_close(still.latents, z_0, rtol=0, atol=1e-7)
    moved = harmonise(model, PICTURE, MASK, how=FEW)
    assert (moved.latents - z_0).abs().max() > 1e-3
    again = harmonise(model, PICTURE, MASK, how=FEW)
    assert torch.equal(moved.latents, again.latents)
    other = redraw(model, PICTURE, origin="a circle", target="a star", how=FEW)
    assert (other.latents - z_0).abs().max() > 1e-3


def test_the_gradient_is_weaker_outside_and_pixels_are_held_where_they_are_asked_to(model, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    monkeypatch.setattr(_delta, "difference", lambda model, z, *rest: torch.ones_like(z))
    z_0, _ = round_trip(model)
    how = Optimisation(iterations=1, lr=64.0)  # of 64 latents, whose mean it goes along
    change = z_0 - remove(model, PICTURE, MASK, how=how, background=0.0).latents
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:4, 2:6] = True
    torch.testing.assert_close(change[..., inside], torch.ones_like(change[..., inside]), rtol=0, atol=1e-6)
    torch.testing.assert_close(change[..., ~inside], torch.full_like(change[..., ~inside], 0.2), rtol=0, atol=1e-6)
    # Pixels pull back what has gone from them, from the second step on, by the mean over what is held.
    twice = Optimisation(iterations=2, lr=64.0, distance=lambda one, other: (one - other).square().sum(1))
    free = remove(model, PICTURE, MASK, how=twice, background=0.0).latents
    held = remove(model, PICTURE, MASK, how=twice, background=0.7).latents
    leaf = (z_0 - change).requires_grad_()
    apart = (model.decode(leaf) - model.decode(z_0).detach()).square().sum(1) * torch.from_numpy(1 - MASK)
    expected = torch.autograd.grad(64 * 0.7 * apart.sum() / (1 - MASK).sum(), leaf)[0].float()
    torch.testing.assert_close(free - held, expected, rtol=1e-3, atol=1e-5)
    rare = Optimisation(iterations=2, lr=64.0, every=2, distance=twice.distance)
    assert torch.equal(remove(model, PICTURE, MASK, how=rare, background=0.7).latents, free)


def test_it_is_watched_and_ended(model):
    seen = []
    how = Optimisation(iterations=5, watch=lambda i, z: seen.append(z.clone()) or i == 1)
    found = harmonise(model, PICTURE, MASK, how=how)
    assert len(seen) == len(found.drift) == 2 and torch.equal(seen[-1], found.latents)
    assert found.drift[-1] == pytest.approx((float(seen[-1].mean()), float(seen[-1].std())))


def test_appearance_is_pixels_and_edges():
    one, other = drawn(1, 3, 8, 8), drawn(1, 3, 8, 8, seed=1)
    assert not appearance(one, one).any()
    shift = torch.full_like(one, 0.5)  # has no edges
    torch.testing.assert_close(appearance(one + shift, one), torch.full((1, 8, 8), 0.5))
    assert appearance(one, other).shape == (1, 8, 8) and (appearance(one, other) > 0).all()


def test_what_it_cannot_do_is_said(model):
    with pytest.raises(UserError, match=r"the mask has \(8, 16\) pixels and the picture \(16, 16\)"):
        remove(model, PICTURE, MASK[:, :8])
    for mask in (np.zeros((16, 16)), np.ones((16, 16))):
        with pytest.raises(UserError, match="must be white somewhere and black somewhere"):
            harmonise(model, PICTURE, mask)
    with pytest.raises(UserError, match="multiples of"):
        redraw(model, PICTURE[:15], origin="a", target="b")
    with pytest.raises(UserError, match="levels of noise between 0 and 1"):
        Optimisation(levels=(0.9, 0.1))


def test_the_script_writes_a_picture(model, tmp_path, monkeypatch, capsys):
    file = Path(__file__).parents[2] / "pipelines/compose/freecompose.py"
    script = runpy.run_path(str(file))
    as_pillow(PICTURE).save(tmp_path / "picture.png")
    as_pillow(MASK).save(tmp_path / "mask.png")
    monkeypatch.setitem(script["main"].__globals__, "load", lambda name: model)

    def run(task, *options):
        out = ["--picture", str(tmp_path / "picture.png"), "--out", str(tmp_path / "out.png"), "--iterations", "1"]
        monkeypatch.setattr(sys, "argv", ["freecompose.py", task, *out, *options])
        script["main"]()
        return as_picture(Image.open(tmp_path / "out.png"))

    found = run("remove", "--mask", str(tmp_path / "mask.png"), "--seed", "3", "--cfg-scale", "1")
    expected = remove(model, PICTURE, MASK, how=Optimisation(iterations=1, seed=3, cfg_scale=1.0)).picture
    np.testing.assert_allclose(found, expected, rtol=0, atol=1 / 255)
    with pytest.raises(SystemExit):
        run("remove", "--target", "a")
    assert "remove needs a --mask" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("redraw", "--target", "a star")
    assert "redraw takes --origin and --target, and no --mask" in capsys.readouterr().err
