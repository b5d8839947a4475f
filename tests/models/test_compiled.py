"""Compiled blocks compute what they did, with an adapter on them, and are compiled once."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch._dynamo.utils import counters

from visiontune import adapters, config
from visiontune.assemble import resources
from visiontune.errors import UserError
from visiontune.models import _compiled


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("family", ["z_image", "sd3"])
def test_blocks_with_an_adapter_are_compiled_once_and_give_the_same_bits(fresh, family):
    model = tiny_model(family)
    networks = model.of(*model.names())
    found = adapters.attach(networks, "lora", targets=["to_q", "to_v"], rank=2)
    trained = [p for p in found.parameters() if p.requires_grad]
    with torch.no_grad():
        for i, p in enumerate(trained):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    cond = model.embed(["a red circle", "a blue square"])

    def step(seed):
        x = torch.randn(2, *model.latent_shape(16, 16), generator=torch.Generator().manual_seed(seed))
        loss = model.predict(x, torch.tensor([100.0, 700.0]), cond).square().mean()
        return loss.detach(), torch.autograd.grad(loss, trained)

    before = [step(seed) for seed in range(2)]
    _compiled.compile_blocks(networks, "tiny", backend="eager")
    assert counters["stats"]["unique_graphs"] == 0
    first = step(0)
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        second = step(1)
        with torch.no_grad():
            for p in trained:
                p.mul_(0.5)
        moved = step(1)
    torch.testing.assert_close([first, second], before, rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] == graphs > 0 and moved[0] != second[0]
    assert _compiled.told() == f"compiled: {graphs} graphs, each whole"


def test_a_network_without_repeated_blocks_is_refused():
    model = tiny_model("amused")
    with pytest.raises(UserError, match=r"diffusers names no repeated blocks of the transformer of 'tiny' \(UVit"):
        _compiled.compile_blocks(model.of("denoiser"), "tiny")


@pytest.mark.parametrize("method", ["oft", "boft"])
def test_an_adapter_that_would_be_compiled_at_every_step_is_refused(method):
    model = tiny_model("z_image")
    found = adapters.attach(model.of("denoiser"), method, targets=["to_q"], block_size=4)
    run = config.load_run("personalise/lora", ["data.root=x", "model.compile=true"])
    with pytest.raises(UserError, match=f"model.compile: adapter '{method}' keeps its rotations"):
        resources.speed_up(run, model)
    found.detach()
    resources.speed_up(run, model)
    assert any(module._compiled_call_impl is not None for module in model.denoiser.modules())


def test_what_was_cut_is_told(fresh):
    counters["graph_break"]["a call of print\nat a line"] = 2
    assert _compiled.told() == "compiled: 0 graphs, cut 2 times where they run uncompiled (a call of print)"
