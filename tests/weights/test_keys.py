"""What other tools call a family's layers.

The names of Stability's own code are judged by diffusers' converter of whole checkpoints and by names known from files.
"""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from tiny import remade, tiny_pipe
from torch import nn

from visiontune.adapters import attach
from visiontune.errors import UserError
from visiontune.weights import keys as package
from visiontune.weights.export import export
from visiontune.weights.keys import keys_of
from visiontune.weights.keys.sd import ldm_names
from visiontune.weights.lora_files import read_lora

SIZES = {"sample_size": 8, "norm_num_groups": 4, "attention_head_dim": 2, "layers_per_block": 2}
ATTENDS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
SD = {
    "block_out_channels": (4, 8, 8, 8),
    "down_block_types": (*(ATTENDS[0],) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *(ATTENDS[1],) * 3),
    "cross_attention_dim": 32,
}
SDXL = {
    "block_out_channels": (4, 8, 16),
    "down_block_types": ("DownBlock2D", *(ATTENDS[0],) * 2),
    "up_block_types": (*(ATTENDS[1],) * 2, "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "use_linear_projection": True,
}
# As they stand in published files of the two architectures.
KNOWN = {
    "sd": {
        "input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
        "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
        "input_blocks_8_1_transformer_blocks_0_attn2_to_k":
            "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k",
        "input_blocks_11_0_out_layers_3": "down_blocks.3.resnets.1.conv2",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_3_1_transformer_blocks_0_attn1_to_q": "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks_11_0_skip_connection": "up_blocks.3.resnets.2.conv_shortcut",
        "time_embed_2": "time_embedding.linear_2",
        "out_2": "conv_out",
    },
    "sdxl": {
        "input_blocks_0_0": "conv_in",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_1_transformer_blocks_1_attn1_to_k":
            "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_k",
        "input_blocks_7_0_skip_connection": "down_blocks.2.resnets.0.conv_shortcut",
        "input_blocks_8_1_transformer_blocks_2_ff_net_0_proj":
            "down_blocks.2.attentions.1.transformer_blocks.2.ff.net.0.proj",
        "middle_block_1_transformer_blocks_0_attn1_to_out_0":
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "output_blocks_0_1_proj_out": "up_blocks.0.attentions.0.proj_out",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_1_transformer_blocks_0_attn2_to_v": "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v",
        "output_blocks_8_0_out_layers_3": "up_blocks.2.resnets.2.conv2",
        "label_emb_0_2": "add_embedding.linear_2",
    },
}  # fmt: skip


def unet(kind):
    torch.manual_seed(0)
    return UNet2DConditionModel(**SIZES, **{"sd": SD, "sdxl": SDXL}[kind]).eval()


def adaptable(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_whole_checkpoint_in_these_names_is_the_unet_to_diffusers(kind):
    model = unet(kind)
    names = ldm_names(model)
    weighted = {name for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    assert weighted <= names.keys()
    flat = [names[name].replace(".", "_") for name in weighted]
    assert len(set(flat)) == len(flat)
    checkpoint = {}
    for key, value in model.state_dict().items():
        layer, _, leaf = key.rpartition(".")
        checkpoint[f"model.diffusion_model.{names[layer]}.{leaf}"] = value
    config = {**model.config, "num_class_embeds": None}
    back = convert_ldm_unet_checkpoint(checkpoint, config)
    assert back.keys() == model.state_dict().keys()
    assert all(back[key] is value or torch.equal(back[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_names_of_published_files(kind):
    names = {theirs.replace(".", "_"): ours for ours, theirs in ldm_names(unet(kind)).items()}
    assert {theirs: names[theirs] for theirs in KNOWN[kind]} == KNOWN[kind]


def factors(layer, rng):
    down = torch.randn(2, *layer.weight.shape[1:], generator=rng)
    up = torch.randn(layer.weight.shape[0], 2, *[1] * (layer.weight.dim() - 2), generator=rng)
    return down, up


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_file_of_kohyas_in_these_names_acts_as_merged(kind, tmp_path):
    rng, pipe = torch.Generator().manual_seed(3), tiny_pipe("sdxl") if kind == "sdxl" else tiny_pipe()
    modules = {"unet": unet(kind), "text_encoder": pipe.text_encoder}
    encoders = {"text_encoder": "lora_te1" if kind == "sdxl" else "lora_te"}
    if kind == "sdxl":
        modules["text_encoder_2"], encoders["text_encoder_2"] = pipe.text_encoder_2, "lora_te2"
    tensors, expected = {}, {}
    chosen = [(f"lora_unet_{theirs}", "unet", ours) for theirs, ours in KNOWN[kind].items()]
    for component, stem in encoders.items():
        level = "" if hasattr(modules[component], "encoder") else "text_model."
        chosen.append((f"{stem}_text_model_encoder_layers_1_mlp_fc1", component, f"{level}encoder.layers.1.mlp.fc1"))
    for stem, component, name in chosen:
        layer = modules[component].get_submodule(name)
        down, up = factors(layer, rng)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(3.0)}
        change = 3 / 2 * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
        expected[f"{component}.{name}"] = layer.weight.detach() + change
    save_file(tensors, tmp_path / "lora.safetensors")
    adapters = read_lora(tmp_path / "lora.safetensors", modules, keys_of(kind, modules))
    assert set(adapters.layers) == set(expected)
    for layer, weight in expected.items():
        torch.testing.assert_close(adapters.weight(layer), weight, rtol=1e-4, atol=1e-5)
    adapters.detach()
    # The third entry is a sampler in both architectures.
    tensors["lora_unet_input_blocks_3_1_proj_in.lora_down.weight"] = torch.ones(2, 4)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="such as 'lora_unet_input_blocks_3_1_proj_in"):
        read_lora(tmp_path / "bad.safetensors", modules, keys_of(kind, modules))


def comfy_keys(kind):
    """Names that ComfyUI's key map has for a UNet: those of the checkpoint, and diffusers' by counting blocks."""
    model, counted = unet(kind), set()
    depths = len(model.config.block_out_channels)
    resnet = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
    for side, per in (("down", 2), ("up", 3)):
        for x in range(depths):
            counted |= {f"{side}_blocks.{x}.resnets.{i}.{leaf}" for i in range(per) for leaf in resnet}
            counted.add(f"{side}_blocks.{x}.{side}samplers.0.conv")
    counted |= {f"mid_block.resnets.{i}.{leaf}" for i in range(2) for leaf in resnet}
    counted |= {name for name in adaptable(model) if ".attentions." in name}
    counted |= {f"time_embedding.linear_{i}" for i in (1, 2)} | {f"add_embedding.linear_{i}" for i in (1, 2)}
    counted |= {"conv_in", "conv_out", "conv_norm_out"}
    theirs = ldm_names(model).values()
    return {f"lora_unet_{n.replace('.', '_')}" for n in theirs}, {f"lora_unet_{n.replace('.', '_')}" for n in counted}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_exported_name_is_in_comfyuis_key_map(kind, tmp_path):
    model = unet(kind)
    adapters = attach({"unet": model}, "lora", targets="all", rank=1)
    export(adapters, tmp_path / "a.safetensors", "kohya", dtype=torch.float32, keys=keys_of(kind, {"unet": model}))
    found = {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")}
    ldm, diffusers = comfy_keys(kind)
    assert len(found) == len(adapters.layers)
    assert found <= (ldm if kind == "sdxl" else diffusers)
    assert keys_of("sd", {}).kohya(adapters.layers).keys() <= diffusers


def test_diffusers_loads_an_exported_file_of_the_xl(tmp_path):
    def tiny():
        pipe = tiny_pipe("sdxl")
        pipe.unet = remade(pipe.unet, **{k: v for k, v in {**SIZES, **SDXL}.items() if k != "sample_size"})
        return pipe

    def parts(pipe):
        return {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}

    pipe, fresh = tiny(), tiny()
    adapters = attach(parts(pipe), "lora", targets=["attention", "conv1", "conv", "q_proj"], rank=2)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    export(adapters, tmp_path / "a.safetensors", "kohya", dtype=torch.float32, keys=keys_of("sdxl", parts(pipe)))
    keys = load_file(tmp_path / "a.safetensors")
    assert any(key.startswith("lora_te1_text_model_encoder") for key in keys)
    assert any(key.startswith("lora_te2_text_model_encoder") for key in keys)
    adapters.merge()
    fresh.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    fresh.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    fresh.unload_lora_weights()
    for component, module in parts(fresh).items():
        own = parts(pipe)[component].state_dict()
        for key, value in module.state_dict().items():
            torch.testing.assert_close(value, own[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


TOY = '''"""A family that another tool numbers."""

from visiontune.weights import keys

class Keys(keys.Keys):
    def kohya(self, layers):
        number = list(self.modules).index
        return {f"toy_{number(layer.partition('.')[0])}_{layer[-1]}": keys.Native((layer,)) for layer in layers}

    def natives(self, layers):
        return super().natives(layers) | self.kohya(layers)
'''


def test_a_file_adds_a_familys_names(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "visiontune.weights.keys.toy", None)
    del sys.modules["visiontune.weights.keys.toy"]
    net, back = nn.Sequential(nn.Linear(4, 6)), nn.Sequential(nn.Linear(4, 6))
    keys = keys_of("toy", {"vae": nn.Identity(), "transformer": net})
    adapters = attach({"transformer": net}, "lora", targets="all", rank=2)
    with torch.no_grad():
        adapters.tensors()["transformer.0.up"].add_(1)
    file = tmp_path / "a.safetensors"
    export(adapters, file, "kohya", dtype=torch.float32, keys=keys)
    assert {key.partition(".")[0] for key in load_file(file)} == {"toy_1_0"}
    change = read_lora(file, {"transformer": back}, keys).change("transformer.0")[0]
    torch.testing.assert_close(change, adapters.change("transformer.0")[0])
    assert change.abs().sum() > 0.1


def test_a_family_without_a_file_has_the_names_of_diffusers_alone(tmp_path):
    net, file = nn.Sequential(nn.Linear(4, 6)), tmp_path / "a.safetensors"
    adapters = attach({"transformer": net}, "lora", targets="all", rank=2)
    keys = keys_of("amused", {"transformer": net})
    for kind in ("kohya", "diff"):
        with pytest.raises(UserError, match="no names for the layers of the family 'amused': export as diffusers"):
            export(adapters, file, kind, dtype=torch.float32, keys=keys)
    export(adapters, file, "diffusers", dtype=torch.float32, keys=keys)
    assert set(load_file(file)) == {f"transformer.0.lora_{half}.weight" for half in "AB"}
    assert keys.names(["transformer.0", "text_encoder.encoder.layers.0.fc1"]) == {
        "transformer.0": "transformer.0",
        "text_encoder.encoder.layers.0.fc1": "text_encoder.encoder.layers.0.fc1",
        "text_encoder.text_model.encoder.layers.0.fc1": "text_encoder.encoder.layers.0.fc1",
    }


def test_a_component_that_kohya_does_not_know_is_refused():
    with pytest.raises(UserError, match=r"'vae\.conv_in' belongs to no component .* knows \(unet, text_encoder\)$"):
        keys_of("sd", {}).kohya(["unet.conv_in", "vae.conv_in"])
