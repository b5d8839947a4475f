"""Few bits: what is rounded and how gradients pass it, tables over noise, files, and what tuning changes."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

from visiontune.errors import UserError
from visiontune.models.low_bits import Bits, Inputs, LowBits, channel_steps, rounded
from visiontune.training.quest import TIME, Tuning, gap, predicted, quantised, sensitivity, trajectories, tune

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def seen():
    return trajectories(tiny_model("sd"), PROMPTS, 3, 3.0, 0)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_gradient_of_a_step_is_that_of_learned_step_sizes():
    x, zero = double(-9.0, -0.7, 0.26, 1.3, 40.0), double(4.0)
    step = double(0.5).requires_grad_()
    bits = 4
    for i, value in enumerate(x.tolist()):
        own = x[i : i + 1].clone().requires_grad_()
        y = rounded(own, step, zero, bits)
        to_step, to_x = torch.autograd.grad(y.sum(), [step, own])
        code = round(value / 0.5)
        inside = 0 <= code + 4 <= 15
        expected = code - value / 0.5 if inside else (-4.0 if code < 0 else 11.0)
        assert torch.allclose(to_step, double(expected)) and to_x.item() == float(inside)
        assert y.item() == pytest.approx(0.5 * min(max(code, -4), 11))


def test_more_bits_lose_less_and_a_channel_has_a_step_of_its_own():
    w = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w *= torch.logspace(-2, 1, 6, dtype=torch.float64).view(-1, 1, 1, 1)
    errors = []
    for bits in (3, 4, 8, 16):
        step, zero = channel_steps(w, bits)
        assert step.shape == zero.shape == (6, 1, 1, 1)
        errors.append((rounded(w, step, zero, bits) - w).flatten(1).norm(dim=1) / w.flatten(1).norm(dim=1))
    assert all((more > less).all() for more, less in itertools.pairwise(errors))
    assert errors[3].max() < 1e-3 and errors[1].max() < 0.15
    # No worse than the whole range, which is one of the shares that are tried.
    flat = w.flatten(1)
    whole = (flat.amax(1) - flat.amin(1)) / 15
    plain = rounded(flat, whole[:, None], (-flat.amin(1) / whole).round()[:, None], 4)
    assert (errors[1] <= (plain - flat).norm(dim=1) / flat.norm(dim=1) + 1e-12).all()


def test_a_noise_level_has_its_own_entry_and_between_two_it_is_interpolated():
    own = Inputs(3, 8)
    with torch.no_grad():
        own.step.copy_(torch.tensor([0.1, 0.3, 0.9]))
        own.low.copy_(torch.tensor([-1.0, -3.0, -9.0]))
    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(own(x, 1.0).sum(), own.step)
    assert grad[1] != 0 and not grad[[0, 2]].any()
    assert torch.allclose(own(x, 0.5), rounded(x, torch.tensor(0.2), torch.tensor(10.0), 8))


def test_a_network_of_many_bits_is_itself_and_taken_out_nothing_is_left(seen):
    made = tiny_model("sd")
    before, keys = predicted(made, seen[1]), made.denoiser.state_dict().keys()
    exact = LowBits(made, Bits(weights=32, inputs=32, ends=32), [one.t for one in seen])
    assert torch.equal(predicted(made, seen[1]), before)
    exact.remove()
    errors = []
    for bits in (16, 8, 4):
        low = quantised(made, Bits(weights=bits, inputs=bits, ends=bits), seen)
        with torch.no_grad():
            errors.append(float((predicted(made, seen[1]) - before).abs().max()))
        low.remove()
    assert errors[0] < 1e-3 and errors[0] < errors[1] < errors[2]
    assert made.denoiser.state_dict().keys() == keys and torch.equal(predicted(made, seen[1]), before)


def test_what_a_call_is_told_finds_its_place(seen):
    made = tiny_model("sd")
    low = quantised(made, Bits(), seen)
    places = []
    for t in (seen[0].t + 1, seen[0].t, (seen[0].t + seen[1].t) / 2, seen[2].t, 0.0):
        low._see(None, (None, torch.tensor(int(t))), {})
        places.append(low._place)
    assert places[0] == places[1] == 0 and 0 < places[2] < 1 and places[3] == 2 and places[4] == 2


def test_tuning_changes_what_is_chosen_alone_and_brings_the_prediction_back(seen):
    made, teacher = tiny_model("sd"), tiny_model("sd")
    low = quantised(made, Bits(weights=3, inputs=8), seen)
    before, start = {name: low.weight(name).clone() for name in low.layers}, gap(made, teacher, seen)
    steps = {name: own.step.detach().clone() for name, own in low.inputs.items()}
    stages: list[str] = []
    tuning = Tuning(
        time_steps=2, steps=20, sensitive=r".+\.(ff\.net|attn\d|conv\d)(\..+)?", lr=2e-4, step_lr=1e-2, rows=4
    )
    tuned = tune(low, teacher, seen, tuning, each=lambda stage, step, loss: stages.append(stage))
    assert stages == ["time"] * 6 + ["all"] * 20
    assert gap(made, teacher, seen) < 0.7 * start
    changed = {name for name, weight in before.items() if not torch.equal(weight, low.weight(name))}
    assert changed == {*tuned} and 0 < len(tuned) < len(low.layers)
    assert all(not torch.equal(step, low.inputs[name].step) for name, step in steps.items())
    assert not any(p.requires_grad for p in made.denoiser.parameters())
    with pytest.raises(UserError, match="is no pattern of a layer's name"):
        tune(low, teacher, seen, Tuning(sensitive="nothing"))


def test_a_teacher_is_matched_exactly_where_nothing_is_rounded(seen):
    made, teacher = tiny_model("sd"), tiny_model("sd")
    low = LowBits(made, Bits(weights=32, inputs=32, ends=32), [one.t for one in seen])
    losses: list[float] = []
    tune(low, teacher, seen, Tuning(time_steps=1, steps=2), each=lambda stage, step, loss: losses.append(loss))
    assert losses == [0.0] * 5


def test_each_layer_is_rounded_alone_to_see_what_it_costs(seen):
    made, teacher = tiny_model("sd"), tiny_model("sd")
    low = quantised(made, Bits(weights=3, inputs=8), seen)
    found = sensitivity(low, teacher, seen[1:2])
    assert found.keys() == low.layers.keys() and [*found.values()] == sorted(found.values(), reverse=True)
    name = next(iter(found))
    with torch.no_grad():
        layer: nn.Module = teacher.denoiser.get_submodule(name)
        layer.weight.copy_(low.layers[name].weight)
        only_weight = gap(tiny_model("sd"), teacher, seen[1:2])
    assert only_weight == pytest.approx(found[name], rel=0.2)


def test_a_file_brings_it_back_to_the_bit(seen, tmp_path):
    made, teacher = tiny_model("sd"), tiny_model("sd")
    low = quantised(made, Bits(weights=4, inputs=8), seen)
    tuned = tune(low, teacher, seen, Tuning(time_steps=1, steps=3, lr=1e-3))
    file = low.save(tmp_path / "low.safetensors", tuned)
    other = tiny_model("sd")
    LowBits.load(other, file)
    for one in seen:
        assert torch.equal(predicted(other, one), predicted(made, one))
    changed = tiny_model("sd")
    with torch.no_grad():
        next(changed.denoiser.parameters()).add_(0.1)
    with pytest.raises(UserError, match=r"was tuned on 'tiny-sd', and 'tiny-sd' is another"):
        LowBits.load(changed, file)
    with pytest.raises(UserError, match="is no model of few bits: fit one by"):
        LowBits.load(tiny_model("sd"), _other_file(tmp_path))


def _other_file(folder):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, folder / "other.safetensors", {"a": "b"})
    return folder / "other.safetensors"


def test_other_networks_are_refused():
    with pytest.raises(UserError, match="few bits are of UNets of Stable Diffusion and SDXL, and 'tiny-flux' is none"):
        LowBits(tiny_model("flux"), Bits(), [500.0])


def test_the_layers_of_time_are_found():
    names = [name for name, m in tiny_model("sd").denoiser.named_modules() if isinstance(m, nn.Linear)]
    found = [name for name in names if re.fullmatch(TIME, name)]
    assert {"time_embedding.linear_1", "time_embedding.linear_2"} < {*found}
    assert all("time" in name for name in found) and copy.copy(found) != names
