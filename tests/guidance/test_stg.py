"""STG: each token's own value in the chosen layers, or blocks that do nothing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model

from visiontune.diffusion.guidance import guided
from visiontune.errors import UserError
from visiontune.guidance import pag, slg, stg
from visiontune.guidance._network import Network
from visiontune.guidance._taps import replaced
from visiontune.guidance.stack import GuidanceStack

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def opened(family):
    """A model in float64, and a condition of it."""
    made = tiny_model(family)
    made.denoiser.double()
    cond = made.embed(["a red circle"])
    pooled = None if cond.pooled is None else cond.pooled.double()
    x = torch.randn(1, *made.latent_shape(), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return made, x, torch.tensor([600]), replace(cond, tokens=cond.tokens.double(), pooled=pooled)


def own_values(layer):
    """What attention gives whose map is the identity, of the layer's own projections; words come after the picture."""

    def attend(hidden_states, encoder_hidden_states=None, **_):
        picture = layer.to_out[0](layer.to_v(hidden_states))
        if encoder_hidden_states is None:
            return picture
        words = layer.add_v_proj(encoder_hidden_states)
        return picture, words if layer.context_pre_only else layer.to_add_out(words)

    return attend


@pytest.mark.parametrize("family", ["sd", "sd3"])
@torch.no_grad()
def test_attention_that_is_skipped_gives_each_token_its_own_value(family):
    made, x, t, cond = opened(family)
    layers = Network.of_model(made).attention("all", "stg")

    def at(*terms, context=None):
        with context or nullcontext():
            return guided(made, x, t, cond, None, GuidanceStack(terms))

    c, worse = at(), at(context=replaced(layers, lambda name, forward: own_values(layers[name])))
    found = at(stg.Config(scale=2.0, layers="all"))
    torch.testing.assert_close(found, c + 2 * (c - worse), **EXACT)
    assert (found - c).abs().max() > 1e-4
    # Where no words stand among the tokens, that is PAG.
    beside = at(pag.Config(scale=2.0, layers="all"))
    assert torch.equal(found, beside) if family == "sd" else (found - beside).abs().max() > 1e-6
    blocks = at(stg.Config(scale=2.0, skip="residual", layers="all"))
    assert torch.equal(blocks, at(slg.Config(scale=2.0, layers="all"))) and not torch.equal(blocks, found)


def test_layers_that_are_not_there_are_said():
    network = Network.of_model(tiny_model("sd"))
    for skip in ("attention", "residual"):
        with pytest.raises(UserError, match="stg: no layer of 'tiny-sd' is called 'mid_blok'"):
            stg.Config(skip=skip, layers="mid_blok").check(network)
