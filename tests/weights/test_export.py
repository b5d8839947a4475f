"""Exported adapters act in other tools as they do here."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_pipe

from visiontune.adapters import attach
from visiontune.errors import UserError
from visiontune.weights import formats
from visiontune.weights._factors import factorise
from visiontune.weights.export import export
from visiontune.weights.keys import keys_of

TARGETS = ["to_q", "to_out.0", "conv1", "proj_in"]
SD = keys_of("sd", {})


def turned(method: str, text: bool = False, targets=None, **options):
    """A tiny pipeline with an adapter that has moved, and its UNet's output."""
    pipe = tiny_pipe()
    parts = {"unet": pipe.unet} | ({"text_encoder": pipe.text_encoder} if text else {})
    adapters = attach(parts, method, targets=(targets or TARGETS) + (["q_proj", "out_proj"] if text else []), **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=rng))
    return pipe, adapters.eval()


def output(pipe) -> torch.Tensor:
    rng = torch.Generator().manual_seed(2)
    ids = pipe.tokenizer(["a word"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = pipe.text_encoder(ids)[0]
        return pipe.unet(torch.randn(1, 4, 8, 8, generator=rng), torch.tensor([500]), hidden).sample


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
@pytest.mark.parametrize("text", [False, True])
def test_diffusers_loads_an_exported_lora_and_draws_the_same(kind: str, text: bool, tmp_path) -> None:
    pipe, adapters = turned("lora", text, rank=3, alpha=6.0)
    adapters.scale = 0.7
    done = export(adapters, tmp_path / "lora.safetensors", kind, dtype=torch.float32, keys=SD)
    assert done.worst < 1e-6
    assert set(done.ranks.values()) == {3}
    fresh = tiny_pipe()
    plain = output(fresh)
    fresh.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    torch.testing.assert_close(output(fresh), output(pipe), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, output(pipe), atol=1e-3)


def test_another_method_goes_over_as_its_best_approximation(tmp_path) -> None:
    pipe, adapters = turned("oft", block_size=4)
    whole = export(adapters, tmp_path / "whole.safetensors", dtype=torch.float32)
    assert whole.worst < 1e-5
    fresh = tiny_pipe()
    fresh.load_lora_weights(str(tmp_path), weight_name="whole.safetensors")
    torch.testing.assert_close(output(fresh), output(pipe), rtol=1e-3, atol=1e-4)
    thin = export(adapters, tmp_path / "thin.safetensors", rank=2, dtype=torch.float32)
    layer = adapters.layers[0]
    change = adapters.change(layer)[0].flatten(1)
    tail = torch.linalg.svdvals(change)[2:].square().sum().sqrt() / change.norm()
    assert thin.errors[layer] == pytest.approx(float(tail), abs=1e-4)
    assert thin.ranks[layer] == 2


def test_a_full_difference_holds_weights_and_biases(tmp_path) -> None:
    pipe, adapters = turned("ssf", targets=["to_out.0", "conv1"])
    before = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    with pytest.raises(UserError, match="has a changed bias, which kohya cannot hold"):
        export(adapters, tmp_path / "a.safetensors", "kohya", dtype=torch.float32, keys=SD)
    assert not list(tmp_path.iterdir())
    export(adapters, tmp_path / "a.safetensors", "diff", dtype=torch.float32, keys=SD)
    saved = load_file(tmp_path / "a.safetensors")
    adapters.merge()
    for layer in adapters.layers:
        name, key = layer.removeprefix("unet."), "lora_" + layer.replace(".", "_")
        weight = pipe.unet.get_parameter(f"{name}.weight")
        torch.testing.assert_close(saved[f"{key}.diff"], weight - before[f"{name}.weight"])
        torch.testing.assert_close(
            saved[f"{key}.diff_b"], pipe.unet.get_parameter(f"{name}.bias") - before[f"{name}.bias"]
        )


def test_what_cannot_be_exported_is_said(tmp_path) -> None:
    _, adapters = turned("lora", rank=2)
    with pytest.raises(UserError, match="unknown format 'webui'; known: diff, diffusers, kohya, merged, peft"):
        export(adapters, tmp_path / "a.safetensors", "webui", dtype=torch.float32)
    adapters.merge()
    with pytest.raises(UserError, match="is merged or disabled"):
        export(adapters, tmp_path / "a.safetensors", dtype=torch.float32)


def test_the_factors_are_the_best_of_their_rank() -> None:
    change = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    down, up = factorise(change, 2)
    s = torch.linalg.svdvals(change.flatten(1))
    left = (change.flatten(1) - up @ down.flatten(1)).norm()
    torch.testing.assert_close(left, s[2:].norm())
    down, up = factorise(change)
    torch.testing.assert_close(up @ down.flatten(1), change.flatten(1))


TOY = '''"""The names of the layers, a line each."""

from visiontune.weights.export import Exported

FOLDER = False

def check(changes, job):
    pass

def write(changes, path, job):
    path.write_text("\\n".join(job.keys.public(layer) for layer in changes.layers))
    return Exported(path, f"{len(changes.layers)} lines of rank {job.rank}")
'''


def test_a_file_adds_a_format(tmp_path, monkeypatch) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "visiontune.weights.formats.toy", None)
    del sys.modules["visiontune.weights.formats.toy"]
    _, adapters = turned("lora", targets=["conv_in", "conv_out"], rank=2)
    done = export(adapters, tmp_path / "names.txt", "toy", dtype=torch.float32, rank=7)
    assert done.text() == f"{tmp_path / 'names.txt'}, 2 lines of rank 7"
    assert done.path.read_text().split() == ["unet.conv_in", "unet.conv_out"]
    with pytest.raises(UserError, match="unknown format 'toys'; known: diff, diffusers, kohya, merged, peft, toy"):
        export(adapters, tmp_path / "a", "toys", dtype=torch.float32)
