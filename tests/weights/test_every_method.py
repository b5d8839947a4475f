"""Whatever a method changes can be carried elsewhere: as a difference, as a LoRA with the error it states, merged."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from contracts.declared import declared
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from tiny import tiny_pipe
from torch import nn

from visiontune import plugin
from visiontune.adapters import attach
from visiontune.adapters._layers import entries_of
from visiontune.errors import UserError
from visiontune.models.sd import StableDiffusion
from visiontune.weights import formats
from visiontune.weights.export import export
from visiontune.weights.keys import keys_of
from visiontune.weights.lora_files import read_lora
from visiontune.weights.peft_folders import read_peft

METHODS = list(declared())
# All of them have biases.
LAYERS = {
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": "unet",
    "down_blocks.0.resnets.0.conv1": "unet",
    "conv_norm_out": "unet",
    "mid_block.attentions.0.transformer_blocks.0.norm2": "unet",
    "embeddings.token_embedding": "text_encoder",
}


def turned(method, factored=False):
    """A tiny pipeline with every kind of layer that the method takes, moved; only linear ones and convolutions."""
    pipe = tiny_pipe()
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    kinds = plugin.load("adapters", method).LAYERS
    chosen = {}
    for layer, component in LAYERS.items():
        module = parts[component].get_submodule(layer)
        if isinstance(module, kinds) and (not factored or isinstance(module, nn.Linear | nn.Conv2d)):
            chosen[layer] = component
    options = {**declared()[method].options, **declared()[method].export_options}
    used = {name: part for name, part in parts.items() if name in chosen.values()}
    adapters = attach(used, method, targets=list(chosen), **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=rng))
    adapters.eval()
    adapters.scale = 0.7
    return pipe, adapters


def output(pipe):
    ids = pipe.tokenizer(["a red circle"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        return pipe.unet(noise, torch.tensor([500]), pipe.text_encoder(ids)[0]).sample


@pytest.mark.parametrize("method", METHODS)
def test_as_a_difference(method, tmp_path):
    pipe, adapters = turned(method)
    export(adapters, tmp_path / "a.safetensors", "diff", dtype=torch.float32, keys=keys_of("sd", {}))
    saved, fresh = load_file(tmp_path / "a.safetensors"), tiny_pipe()
    plain = output(fresh)
    with torch.no_grad():
        for layer, component in LAYERS.items():
            stem = f"text_encoders.clip_l.transformer.text_model.{layer}"
            if component == "unet":
                stem = f"lora_unet_{layer.replace('.', '_')}"
            target = getattr(fresh, component).get_submodule(layer)
            if f"{stem}.diff" in saved:
                target.weight += saved.pop(f"{stem}.diff")
            if f"{stem}.diff_b" in saved:
                target.bias += saved.pop(f"{stem}.diff_b")
    assert not saved
    torch.testing.assert_close(output(fresh), output(pipe), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, output(pipe), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_merged(method, tmp_path):
    pipe, adapters = turned(method)
    expected = output(pipe)
    export(adapters, tmp_path / "model", "merged", dtype=torch.float32, model=StableDiffusion(pipe))
    fresh = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    torch.testing.assert_close(output(fresh), expected, rtol=1e-4, atol=1e-5)


def _has_tensors(layer) -> bool:
    """Whether the method does not leave the layer as it is."""
    return bool(entries_of(layer)[0].adapter.tensors())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [None, 2])
def test_as_a_lora_with_the_error_that_it_states(method, rank, tmp_path):
    pipe, adapters = turned(method, factored=True)
    if any(b is not None and b.any() for b in (adapters.change(layer)[1] for layer in adapters.layers)):
        with pytest.raises(UserError, match="has a changed bias, which diffusers cannot hold"):
            export(adapters, tmp_path / "a.safetensors", rank=rank, dtype=torch.float32)
        return
    done = export(adapters, tmp_path / "a.safetensors", rank=rank, dtype=torch.float32)
    fresh = tiny_pipe()
    fresh.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    tuned = [layer for layer in adapters.layers if _has_tensors(adapters.layer(layer))]
    assert done.errors.keys() == set(tuned) and tuned
    for layer in tuned:
        name = layer.removeprefix("unet.")
        change = (fresh.unet.get_submodule(name).weight - adapters.layer(layer).weight).detach()
        whole = adapters.change(layer)[0]
        assert float((change - whole).norm() / whole.norm()) == pytest.approx(done.errors[layer], abs=1e-3)
        assert whole.norm() > 1e-3
    if rank is None:
        assert done.worst < 1e-5
        torch.testing.assert_close(output(fresh), output(pipe), rtol=1e-3, atol=1e-4)


# Why a method is in no file of a format, which the formats' own tests have.
UNWRITTEN = "has a changed bias|PEFT has no format for|convolution with a kernel|factor for each output|one block size"


@pytest.mark.parametrize("kind", sorted(set(formats.names()) - {"merged"}))
@pytest.mark.parametrize("method", METHODS)
def test_what_is_exported_is_imported_with_equal_outputs(method, kind, tmp_path):
    pipe, adapters = turned(method, factored=kind != "diff")
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    try:
        export(adapters, tmp_path / "a.safetensors", kind, dtype=torch.float32, keys=keys_of("sd", parts))
    except UserError as error:
        assert re.search(UNWRITTEN, str(error))
        return
    back = tiny_pipe()
    parts = {"unet": back.unet, "text_encoder": back.text_encoder}
    if kind == "peft":
        imported = read_peft(tmp_path / "a.safetensors", {"unet": back.unet})
    else:
        imported = read_lora(tmp_path / "a.safetensors", parts, keys_of("sd", parts))
    assert set(imported.layers) <= set(adapters.layers)
    torch.testing.assert_close(output(back), output(pipe), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(output(tiny_pipe()), output(back), atol=1e-3)


def test_what_no_lora_and_no_other_reader_can_hold_is_refused(tmp_path):
    pipe = tiny_pipe()
    unchanged = copy.deepcopy(pipe.unet.state_dict())
    for kind, component, target in (("norm2", "unet", "norm2"), ("token_embedding", "text_encoder", "token_embedding")):
        adapters = attach({component: getattr(pipe, component)}, "dense", targets=[target])
        with pytest.raises(UserError, match=f"{kind}' is neither linear nor a convolution, as kohya needs"):
            export(adapters, tmp_path / "a.safetensors", "kohya", dtype=torch.float32, keys=keys_of("sd", {}))
        adapters.detach()
    adapters = attach({"unet": pipe.unet}, "bitfit", targets=["to_q"], create=True)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(1)
    with pytest.raises(UserError, match="to_q' got a bias that the base's layer does not have"):
        export(adapters, tmp_path / "a.safetensors", "diff", dtype=torch.float32, keys=keys_of("sd", {}))
    with pytest.raises(UserError, match="to_q' got a bias that the base's layer does not have"):
        export(adapters, tmp_path / "model", "merged", dtype=torch.float32, model=StableDiffusion(pipe))
    assert not list(tmp_path.iterdir())
    assert pipe.unet.state_dict().keys() == unchanged.keys()
