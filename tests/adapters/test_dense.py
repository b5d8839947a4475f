"""Dense changes train what full fine-tuning trains; half fine-tuning holds halves still."""

from __future__ import annotations

import copy

import pytest
import torch
from contracts.declared import Declared
from torch import nn

from visiontune.adapters import attach
from visiontune.adapters.dense import half
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    bias = getattr(module, "bias", None) if options.get("biases", True) else None
    return module.weight.numel() + (0 if bias is None else bias.numel())


CONTRACT = {"dense": Declared(_count, variants=({"biases": False},))}


def net() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"to_q": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}) for _ in range(4)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks)})


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for block in model["blocks"]:
        x = torch.tanh(block["norm"](block["to_q"](x)))
    return x


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
TARGETS = ["to_q", "norm"]


def train(model, parameters, steps, before=lambda step: None, after=lambda step, optimizer: None):
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        run(model, X).pow(2).sum().backward()
        before(step)
        optimizer.step()
        after(step, optimizer)


def test_it_is_full_fine_tuning_of_its_layers():
    mine, full = net(), net()
    adapters = attach({"unet": mine}, "dense", targets=TARGETS)
    train(mine, list(adapters.parameters()), 5)
    train(full, list(full.parameters()), 5)
    torch.testing.assert_close(run(mine, X), run(full, X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(mine, X), run(net(), X), atol=1e-2)
    with adapters.disable():
        assert torch.equal(run(mine, X), run(net(), X))


def test_biases_can_be_left_alone():
    model = net()
    adapters = attach({"unet": model}, "dense", targets=TARGETS, biases=False)
    assert adapters.parameter_count == 4 * (36 + 6)
    train(model, list(adapters.parameters()), 2)
    layer = adapters.layers[0]
    assert torch.equal(adapters.bias(layer), model["blocks"][0]["to_q"].bias)


def test_a_newly_drawn_half_holds_still_bit_for_bit_in_each_round():
    model, steps, rounds = net(), 12, 4
    adapters = attach({"unet": model}, "dense", targets=TARGETS, rounds=rounds, seed=3)
    method = adapters.methods()[0]
    moved, seen = set(), []

    def values():
        return {name: copy.deepcopy(change.state_dict()) for name, change in method.changes.items()}

    state = {"before": values()}

    def before(step):
        adapters.before_step(step)
        state["still"] = method.still

    def after(step, optimizer):
        changed = {
            name
            for name, tensors in values().items()
            if any(not torch.equal(t, state["before"][name][key]) for key, t in tensors.items())
        }
        assert changed == set(method.changes) - state["still"]
        seen.append(frozenset(state["still"]))
        moved.update(changed)
        adapters.after_step((step + 1) / steps, optimizer)
        for name in method.still:
            assert not any(p in optimizer.state for p in method.changes[name].parameters()) or step + 1 == steps
        state["before"] = values()

    train(model, list(adapters.parameters()), steps, before, after)
    assert len(moved) > len(method.changes) / 2
    assert [len(set(seen[i : i + 3])) for i in range(0, steps, 3)] == [1] * rounds
    assert len(set(seen)) > 1


@pytest.mark.parametrize("count", [2, 5, 8])
def test_half_of_every_kind_to_within_one_layer(count):
    names = [f"blocks.{i}.{kind}" for kind in ("to_q", "to_out.0", "norm") for i in range(count)]
    for turn in range(6):
        still = half(names, 0, turn)
        assert still == half(names, 0, turn)
        for kind in ("to_q", "to_out.0", "norm"):
            assert abs(sum(name.endswith(kind) for name in still) - count / 2) <= 0.5


def test_the_round_is_part_of_the_state():
    one = attach({"unet": net()}, "dense", targets=TARGETS, rounds=4)
    one.after_step(0.6)
    other = attach({"unet": net()}, "dense", targets=TARGETS, rounds=4)
    other.load_state_dict(one.state_dict())
    assert other.methods()[0].still == one.methods()[0].still != half(list(one.methods()[0].changes), 0, 0)


def test_bad_rounds_are_refused():
    with pytest.raises(UserError, match="rounds must be a whole number from 0"):
        attach({"unet": net()}, "dense", targets=TARGETS, rounds=-1)
