"""What networks that take a share of the schedule are told in low precision."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch import nn

from visiontune.models._time import exact_time

T = torch.tensor([3.25, 499.5, 875.0, 998.4, 999.9])


@pytest.mark.parametrize("computed", ["weights", "autocast"])
@pytest.mark.parametrize(
    ("family", "options", "place", "scale"),
    [
        ("flux", {}, "time_text_embed", 1),
        ("flux2", {"dev": True}, "time_guidance_embed", 1),
        ("qwen_image", {}, "time_text_embed", 1 / 1000),
    ],
)
def test_sines_are_made_of_the_exact_time(family, options, place, scale, computed):
    model = tiny_model(family, **options)
    cond = model.embed(["a"] * len(T))
    model = model.at(torch.bfloat16) if computed == "autocast" else model
    if computed == "weights":
        model.pipe.to(torch.bfloat16)
    seen = []
    embed = getattr(model.denoiser, place)
    embed.time_proj.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    for _ in range(2):  # nothing is left of the first call
        with torch.no_grad():
            model.predict(torch.zeros(len(T), *model.latent_shape()), T, cond)
        calls = [*seen]
        seen.clear()
        told, sines = calls[0]
        assert told.dtype == sines.dtype == torch.float32
        torch.testing.assert_close(told / scale, T, rtol=2e-7, atol=0)
        assert len(calls) == 1 + bool(getattr(model, "embedded", False)), "a guidance scale has sines of its own"


def test_a_call_that_fails_leaves_nothing_behind():
    module = nn.Identity()
    with pytest.raises(RuntimeError), exact_time(module, torch.ones(1)):
        raise RuntimeError
    assert module(torch.zeros(1)) == 0
    with exact_time(module, torch.ones(1)):
        assert [float(module(torch.zeros(1))) for _ in range(2)] == [1, 0]
