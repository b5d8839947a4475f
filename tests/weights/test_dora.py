"""DoRA in files of diffusers and LyCORIS (kohya's scripts), in both directions."""

from __future__ import annotations

import peft
import pytest
import torch
from contracts.declared import turned
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_pipe
from torch import nn

from visiontune.adapters import attach
from visiontune.weights.export import export
from visiontune.weights.keys import keys_of
from visiontune.weights.lora_files import read_lora
from visiontune.weights.peft_folders import read_peft

TARGETS = ["to_q", "to_out.0", "conv1", "proj_in"]


def output(pipe):
    ids = pipe.tokenizer(["a word"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        return pipe.unet(noise, torch.tensor([500]), pipe.text_encoder(ids)[0]).sample


def adapted(scale=1.0):
    pipe = tiny_pipe()
    adapters = turned(attach({"unet": pipe.unet}, "lora", targets=TARGETS, rank=3, alpha=6.0, dora=True))
    adapters.scale = scale
    return pipe, adapters


def kernels():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 5, (1, 3), bias=False))


def test_a_convolution_with_a_kernel_is_pefts_too(tmp_path):
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    net = kernels()
    export(
        turned(attach({"unet": net}, "lora", targets=["0", "1"], rank=2, dora=True)),
        tmp_path / "mine",
        "peft",
        dtype=torch.float32,
    )
    theirs = PeftModel.from_pretrained(kernels(), str(tmp_path / "mine")).eval()
    torch.testing.assert_close(theirs(x), net(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(kernels()(x), net(x), atol=1e-2)
    trained = turned(get_peft_model(kernels(), LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["0", "1"])))
    trained.save_pretrained(str(tmp_path / "theirs"))
    back = kernels()
    assert read_peft(tmp_path / "theirs", {"unet": back}).config.dora
    torch.testing.assert_close(back(x), trained(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_diffusers_loads_an_exported_dora_and_draws_the_same(scale, tmp_path):
    pipe, adapters = adapted(scale)
    done = export(adapters, tmp_path / "dora.safetensors", "diffusers", dtype=torch.float32)
    assert done.dora
    assert done.worst < 1e-6
    fresh = tiny_pipe()
    fresh.load_lora_weights(str(tmp_path), weight_name="dora.safetensors")
    torch.testing.assert_close(output(fresh), output(pipe), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output(tiny_pipe()), output(pipe), atol=1e-3)


def test_what_diffusers_saves_comes_in(tmp_path):
    pipe, back = tiny_pipe(), tiny_pipe()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=7, use_dora=True, target_modules=["to_q", "conv1"]))
    turned(pipe.unet)
    pipe.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    assert read_lora(tmp_path / "pytorch_lora_weights.safetensors", {"unet": back.unet}).config.dora
    torch.testing.assert_close(output(back), output(pipe), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output(tiny_pipe()), output(pipe), atol=1e-3)


def test_kohyas_files_hold_the_lengths_as_lycoris_does(tmp_path):
    """Judged by DoRA's equation 5 over the file's own numbers: W' = m V / |V| with |V| of the outputs' rows."""
    pipe, adapters = adapted(0.6)
    file = tmp_path / "dora.safetensors"
    export(adapters, file, "kohya", dtype=torch.float32, keys=keys_of("sd", {}))
    saved, plain = load_file(file), tiny_pipe().unet
    for layer in adapters.layers:
        stem, w = "lora_" + layer.replace(".", "_"), plain.get_submodule(layer.removeprefix("unet.")).weight
        up, down = saved[f"{stem}.lora_up.weight"].flatten(1), saved[f"{stem}.lora_down.weight"].flatten(1)
        v = w.flatten(1) + saved[f"{stem}.alpha"] / len(down) * up @ down
        scale = saved[f"{stem}.dora_scale"]
        assert scale.shape == (len(w), *[1] * (w.dim() - 1))
        expected = scale.flatten(1) * v / v.norm(dim=1, keepdim=True)
        torch.testing.assert_close(adapters.weight(layer).flatten(1), expected, rtol=1e-4, atol=1e-5)
    back = tiny_pipe()
    read_lora(file, {"unet": back.unet}, keys_of("sd", {"unet": back.unet}))
    torch.testing.assert_close(output(back), output(pipe), rtol=1e-4, atol=1e-5)


def test_a_rank_asks_for_a_plain_lora(tmp_path):
    _, adapters = adapted()
    done = export(
        adapters, tmp_path / "plain.safetensors", "kohya", rank=2, dtype=torch.float32, keys=keys_of("sd", {})
    )
    assert not done.dora
    assert 0.01 < done.worst < 1
    assert not any("dora" in key for key in load_file(tmp_path / "plain.safetensors"))


def two(rng):
    """A network of two layers and a kohya file's factors of both, the first square."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    tensors = {}
    for name, layer in net.named_children():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, layer.in_features, generator=rng)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(layer.out_features, 2, generator=rng)
    return net, tensors


def test_layers_without_lengths_stay_plain_lora(tmp_path):
    rng = torch.Generator().manual_seed(3)
    net, tensors = two(rng)
    tensors["lora_unet_0.dora_scale"] = torch.rand(6, 1, generator=rng) + 1
    save_file(tensors, tmp_path / "a.safetensors")
    adapters = read_lora(tmp_path / "a.safetensors", {"unet": net}, keys_of("sd", {"unet": net}))
    assert adapters.method == "lora"
    change = tensors["lora_unet_1.lora_up.weight"] @ tensors["lora_unet_1.lora_down.weight"]
    torch.testing.assert_close(adapters.weight("unet.1"), net[1].weight + change)
    torch.testing.assert_close(adapters.weight("unet.0").norm(dim=1, keepdim=True), tensors["lora_unet_0.dora_scale"])


def test_lengths_of_columns_become_a_whole_change(tmp_path):
    """LyCORIS without ``wd_on_out``: each input's column of W + BA gets the length of the file."""
    rng = torch.Generator().manual_seed(3)
    net, tensors = two(rng)
    scale = tensors["lora_unet_0.dora_scale"] = torch.rand(1, 6, generator=rng) + 1
    save_file(tensors, tmp_path / "b.safetensors")
    adapters = read_lora(tmp_path / "b.safetensors", {"unet": net}, keys_of("sd", {"unet": net}))
    v = net[0].weight + tensors["lora_unet_0.lora_up.weight"] @ tensors["lora_unet_0.lora_down.weight"]
    torch.testing.assert_close(adapters.weight("unet.0"), scale * v / v.norm(dim=0, keepdim=True))
    change = tensors["lora_unet_1.lora_up.weight"] @ tensors["lora_unet_1.lora_down.weight"]
    torch.testing.assert_close(adapters.weight("unet.1"), net[1].weight + change)


def of_text(family, dora):
    pipe = tiny_pipe(family)
    parts = {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)}
    return pipe, parts, turned(attach(parts, "lora", targets=["q_proj", "fc1"], rank=2, dora=dora))


def hidden(pipe):
    with torch.no_grad():
        found = [
            part(torch.arange(8)[None])[0]
            for part in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None))
            if part
        ]
    return torch.cat([t.flatten() for t in found])


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("dora", [True, False])
def test_diffusers_loads_text_encoders_too(family, dora, tmp_path):
    pipe, parts, adapters = of_text(family, dora)
    export(adapters, tmp_path / "a.safetensors", dtype=torch.float32, keys=keys_of(family, parts))
    fresh, plain = tiny_pipe(family), hidden(tiny_pipe(family))
    fresh.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    torch.testing.assert_close(hidden(fresh), hidden(pipe), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, hidden(pipe), atol=1e-2)
    adapters.detach()
    read_lora(tmp_path / "a.safetensors", parts, keys_of(family, parts))
    torch.testing.assert_close(hidden(fresh), hidden(pipe), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [0.5, -1.0, 0.0])
def test_other_strengths_are_others_in_peft_and_are_written_into_the_file(strength, tmp_path):
    """Here a strength scales the lengths too, so that 0 is the base; PEFT leaves them as they were trained."""
    net, base = kernels(), kernels()
    adapters = turned(attach({"unet": net}, "lora", targets=["0"], rank=2, dora=True))
    export(adapters, tmp_path / "whole", "peft", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(kernels(), str(tmp_path / "whole")).eval()
    theirs.base_model.model[0].scaling["default"] = strength
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    adapters.scale = strength
    factors, w = adapters.tensors(), base[0].weight.flatten(1)
    v = w + strength * factors["unet.0.up"] @ factors["unet.0.down"].flatten(1)
    unit, length, gain = v / v.norm(dim=1, keepdim=True), w.norm(dim=1), factors["unet.0.gain"]
    for model, weight in ((net, (length + strength * gain)[:, None] * unit), (theirs, (length + gain)[:, None] * unit)):
        base[0].weight.data.copy_(weight.view_as(base[0].weight))
        torch.testing.assert_close(model(x), base(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(x), theirs(x), atol=1e-2)
    export(adapters, tmp_path / "folded", "peft", dtype=torch.float32)
    folded = PeftModel.from_pretrained(kernels(), str(tmp_path / "folded")).eval()
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)
    if strength == 0:
        torch.testing.assert_close(net(x), kernels()(x))


def test_a_plain_layer_beside_one_of_dora_keeps_its_lengths(tmp_path):
    """Two sets, of which one is DoRA: readers take the file for DoRA throughout."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    plain = turned(attach({"unet": net}, "lora", targets=["0"], rank=3, name="plain"))
    dora = turned(attach({"unet": net}, "lora", targets=["1"], rank=2, dora=True, name="dora"))
    fresh = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    fresh.load_state_dict(net.state_dict())
    export([plain, dora], tmp_path / "both", "peft", dtype=torch.float32)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    theirs = PeftModel.from_pretrained(fresh, str(tmp_path / "both")).eval()
    torch.testing.assert_close(theirs(x), net(x), rtol=1e-4, atol=1e-5)
