"""Families whose own code has other layers than diffusers: kohya's, ComfyUI's and musubi's files, both ways.

The names are those of the readers' own code, run on the layers of the tiny models (`tests/weights/names`): ComfyUI
0.3.64 (FLUX.2 of musubi-tuner, Z-Image of `comfy/utils.py` at 09708ea), and what a network of sd-scripts 0.10.1 or
musubi-tuner 0.3.4 is made of from a file that has every name. What the layers are made of is judged by diffusers'
converters of whole checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    ErnieImageTransformer2DModel,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import nn

from visiontune.adapters import attach
from visiontune.core import Request
from visiontune.errors import UserError
from visiontune.weights._factors import Factors
from visiontune.weights._native import joined, split, whole
from visiontune.weights.export import export
from visiontune.weights.keys import Native, keys_of
from visiontune.weights.lora_files import read_lora

NAMES = {file.stem: json.loads(file.read_text()) for file in sorted((Path(__file__).parent / "names").iterdir())}
FAMILIES = list(NAMES)
# The variant with the most layers.
MOST = {"flux2": {"dev": True}}
# At the published widths, which some converters know by heart.
WIDE = {
    "sd3": (SD3Transformer2DModel, {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}),
    "flux": (FluxTransformer2DModel, {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}),
    "flux2": (Flux2Transformer2DModel, {"num_layers": 1, "num_single_layers": 1}),
    "z_image": (ZImageTransformer2DModel, {"n_layers": 1, "n_refiner_layers": 1}),
    "krea2": (Krea2Transformer2DModel, {"num_layers": 1}),
    "chroma": (ChromaTransformer2DModel, {"num_layers": 1, "num_single_layers": 1}),
    "auraflow": (AuraFlowTransformer2DModel, {"num_mmdit_layers": 1, "num_single_dit_layers": 1}),
    "lumina2": (Lumina2Transformer2DModel, {"num_layers": 1, "num_refiner_layers": 1}),
    "ernie_image": (ErnieImageTransformer2DModel, {"num_layers": 1}),
    "hidream": ({"num_layers": 1, "num_single_layers": 1, "caption_channels": (32, 64)},),
    "ideogram4": (Ideogram4Transformer2DModel, {"num_layers": 1}),
}
CONVERTERS = {
    name: getattr(single_file_utils, f"convert_{name}_transformer_checkpoint_to_diffusers")
    for name in ("sd3", "flux", "flux2", "z_image", "krea2", "chroma", "auraflow", "ernie_image")
}
CONVERTERS["lumina2"] = single_file_utils.convert_lumina2_to_diffusers
# What converters ask for that is no layer.
FLUX = [f"double_blocks.0.{s}_attn.norm.{x}_norm.scale" for s in ("img", "txt") for x in ("query", "key")]
FLUX += [f"single_blocks.0.norm.{x}_norm.scale" for x in ("query", "key")]
NORMS = {
    "sd3": ["pos_embed"]
    + [
        f"joint_blocks.{i}.{half}.attn.ln_{x}.weight"
        for i in (0, 1)
        for half in ("x_block", "context_block")
        for x in "qk"
    ]
    + [f"joint_blocks.0.x_block.attn2.ln_{x}.weight" for x in "qk"],
    "flux": FLUX,
    "chroma": FLUX + [f"distilled_guidance_layer.norms.{i}.scale" for i in range(5)],
    "auraflow": ["positional_encoding"],
}


def keys_for(model):
    return keys_of(model.family, model.networks())


def layers_of(model):
    """All linear layers and convolutions of the transformer."""
    named = model.denoiser.named_modules()
    return [f"transformer.{name}" for name, layer in named if isinstance(layer, nn.Linear | nn.Conv2d)]


def adapted(model, layers, method="lora", **options):
    options = options or ({"rank": 2} if method == "lora" else {})
    parts = dict.fromkeys(layer.partition(".")[0] for layer in layers)
    found = attach(model.of(*parts), method, targets=list(layers), **options)
    moved(found)
    return found.eval()


def moved(found):
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))


def written(found, model, kind, path):
    return export(found, path, kind, dtype=torch.float32, keys=keys_for(model), model=model)


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_the_familys_own_code_are_those_of_its_readers(family):
    model = tiny_model(family, **MOST.get(family, {}))
    keys, names = keys_for(model), NAMES[family]
    assert sorted(keys.own) == names["own"]
    made = [layer for native in keys.own.values() for layer in native.layers]
    assert sorted(made) == sorted(layers_of(model))
    assert {*names.get("kohya", ())} <= {name.replace(".", "_") for name in keys.scripts}
    for name, parts in names.get("parts", {}).items():
        assert keys.own[name].layers == tuple(f"transformer.{part}" for part in parts)


@pytest.mark.parametrize("family", ["sd3", "flux", "chroma", "lumina2"])
def test_what_sd_scripts_leaves_out_is_known(family):
    model = tiny_model(family)
    keys, names = keys_for(model), NAMES[family]
    for name, native in keys.kohya(layers_of(model)).items():
        reads = name.removeprefix("lora_unet_") in names["kohya"]
        assert [bool(keys.READERS["sd-scripts"].places.match(layer)) for layer in native.layers] == [reads] * len(
            native.layers
        )
    if "text" not in names:
        return
    text = [
        f"{component}.{name}"
        for component in model.of("text")
        for name, layer in model.networks()[component].named_modules()
        if isinstance(layer, nn.Linear)
    ]
    read = {
        name for name, (layers, _) in keys.kohya(text).items() if keys.READERS["sd-scripts"].places.match(layers[0])
    }
    assert {*names["text"]} == {name for name in read if family == "sd3" or name.startswith("lora_te3")}


def test_what_comfyui_leaves_out_of_kohyas_files_of_z_image_is_known():
    model = tiny_model("z_image")
    keys, own = keys_for(model), {name.replace(".", "_") for name in NAMES["z_image"]["own"]}
    for name, native in keys.kohya(layers_of(model)).items():
        read = keys.READERS["ComfyUI"].places.match(native.layers[0])
        assert bool(read) is (name.removeprefix("lora_unet_") in own), name


@pytest.mark.parametrize("family", CONVERTERS)
def test_diffusers_makes_our_layers_of_a_whole_checkpoint_in_these_names(family):
    """With one column of each weight: converters look at rows alone."""
    cls, config = WIDE[family]
    with torch.device("meta"):
        transformer = cls(**config)
    keys, rng = keys_of(family, {"transformer": transformer}), torch.Generator().manual_seed(0)
    expected, checkpoint = {}, {name: torch.zeros(4) for name in NORMS.get(family, ())}
    for name, native in keys.own.items():
        for leaf, columns in (("weight", (1,)), ("bias", ())):
            own = {layer: getattr(keys.module(layer), leaf) for layer in native.layers}
            if None in own.values():
                continue
            drawn = {layer: torch.randn(len(v), *columns, generator=rng) for layer, v in own.items()}
            expected |= {f"{layer.removeprefix('transformer.')}.{leaf}": value for layer, value in drawn.items()}
            checkpoint[f"{name}.{leaf}"] = whole(native, list(drawn.values()))
    found = CONVERTERS[family](checkpoint)
    assert len(expected) > 15 and expected.keys() <= found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_means_two_things(family):
    model = tiny_model(family)
    keys, found = keys_for(model), {}
    for layers in (layers_of(model), *([layer] for layer in layers_of(model))):
        for name, native in keys.natives(layers).items():
            assert found.setdefault(name.replace(".", "_"), native) == native, name


def test_published_files_say_what_they_are_of():
    described = {family: keys_for(tiny_model(family)).described("flow") for family in FAMILIES}
    assert described == {
        "sd3": ("stable-diffusion-3", "sd3"),
        "flux": ("flux-1-dev", "flux1"),
        "flux2": ("Flux.2-klein", "flux_2_klein"),
        "z_image": ("Z-Image", "z_image"),
        "qwen_image": ("Qwen-Image", "qwen_image"),
        "krea2": ("Krea-2", "krea2"),
        "chroma": ("chroma", "chroma"),
        "auraflow": ("auraflow", "auraflow"),
        "lumina2": ("lumina-2", "lumina2"),
        "pixart": ("pixart", "pixart"),
        "ernie_image": ("ernie_image", "ernie_image"),
        "hidream": ("hidream", "hidream"),
        "ideogram4": ("Ideogram-4", "ideogram4"),
    }
    assert keys_for(tiny_model("flux", schnell=True)).described("flow")[0] == "flux-1-schnell"
    assert keys_for(tiny_model("flux2", dev=True)).described("flow") == ("Flux.2-dev", "flux_2_dev")
    klein = tiny_model("flux2")
    klein.denoiser.register_to_config(num_attention_heads=24, attention_head_dim=128)
    assert keys_for(klein).described("flow") == ("Flux.2-klein-4b", "flux_2_klein_4b")


# --------------------------------------------------------------------------------------------------------------- files


def patched(model, path, table):
    """Weights and biases of the transformer's layers as ComfyUI makes them of a file: W + alpha / r B A, or W + D."""
    tensors, found = load_file(path), {}
    for name, native in table.items():
        stem, layers = f"lora_unet_{name.replace('.', '_')}", [keys_for(model).module(layer) for layer in native.layers]
        weight = whole(native, [layer.weight.detach() for layer in layers])
        bias = None if layers[0].bias is None else whole(native, [layer.bias.detach() for layer in layers])
        if f"{stem}.lora_up.weight" in tensors:
            up, down = tensors.pop(f"{stem}.lora_up.weight"), tensors.pop(f"{stem}.lora_down.weight")
            scale = tensors.pop(f"{stem}.alpha") / len(down)
            weight = weight + scale * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        weight = weight + tensors.pop(f"{stem}.diff", 0)
        bias = None if bias is None else bias + tensors.pop(f"{stem}.diff_b", 0)
        halves = [
            value if value is None or not native.swapped else value.roll(len(value) // 2, 0) for value in (weight, bias)
        ]
        rows = [len(layer.weight) for layer in layers]
        for i, layer in enumerate(native.layers):
            found[layer] = tuple(None if value is None else value.split(rows)[i] for value in halves)
    assert not tensors
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["kohya", "diff"])
@pytest.mark.parametrize("method", ["lora", "dense"])
def test_a_readers_weights_are_ours(family, kind, method, tmp_path):
    """Of every layer, and where only some of the layers change that the reader has as one."""
    model = tiny_model(family)
    layers = layers_of(model)
    if method == "dense":
        layers = [layer for layer in layers if not layer.endswith(("to_k", "add_v_proj", "proj_mlp"))]
    found = adapted(model, layers, method, **({"biases": kind == "diff"} if method == "dense" else {}))
    written(found, model, kind, tmp_path / "a.safetensors")
    keys, clean = keys_for(model), tiny_model(family)
    table = keys.scripts if kind == "kohya" else keys.own
    after = patched(clean, tmp_path / "a.safetensors", table)
    for layer, (weight, bias) in after.items():
        base = keys_for(clean).module(layer)
        change, shift = found.change(layer) if layer in layers else (0, None)
        torch.testing.assert_close(
            weight, base.weight + change, rtol=1e-4, atol=1e-5, msg=lambda m, n=layer: f"{n} {m}"
        )
        if bias is not None:
            torch.testing.assert_close(bias, base.bias + (0 if shift is None else shift), rtol=1e-4, atol=1e-5)


def test_layers_of_one_have_as_many_ranks_each():
    """By which kohya's scripts and converters cut them apart again, those that do not change too."""
    model = tiny_model("flux")
    keys = keys_for(model)
    native = keys.own["single_blocks.0.linear1"]
    inputs, rows = 32, {layer: len(keys.module(layer).weight) for layer in native.layers}
    parts = {
        layer: Factors(torch.randn(rank, inputs), torch.randn(rows[layer], rank))
        for layer, rank in zip(native.layers, (1, 3), strict=False)
    }
    made = joined(native, parts, keys)
    assert made.down.shape == (12, inputs) and made.up.shape == (sum(rows.values()), 12)
    blocks = [up.split(3, 1) for up in made.up.split(list(rows.values()))]
    assert [[bool(block.any()) for block in row] for row in blocks] == [
        [i == j and i < 2 for j in range(4)] for i in range(4)
    ]
    back = split(native, made, list(rows.values()))
    assert {layer: part.rank for layer, part in back.items()} == {layer: part.rank for layer, part in parts.items()}
    for layer, part in back.items():
        torch.testing.assert_close(part.up @ part.down, parts[layer].up @ parts[layer].down)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["kohya", "diff", "diffusers"])
def test_what_is_written_is_read_back_of_the_same_ranks(family, kind, tmp_path):
    model, back = tiny_model(family), tiny_model(family)
    layers = [layer for layer in layers_of(model) if not layer.endswith("to_v")]
    found = adapted(model, layers)
    if kind == "diffusers" and not hasattr(model.pipe, "load_lora_weights"):
        with pytest.raises(UserError, match=r"loads no LoRA of its transformer.*: export as diff, kohya"):
            written(found, model, kind, tmp_path / "a.safetensors")
        return
    written(found, model, kind, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors", back.networks(), keys_for(back))
    assert sorted(read.layers) == sorted(layers)
    assert read.method == ("dense" if kind == "diff" else "lora") and (kind == "diff" or read.config.rank == 2)
    for layer in layers:
        torch.testing.assert_close(read.change(layer)[0], found.change(layer)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_dora_keeps_the_lengths_of_each_layer(family, tmp_path):
    model, back = tiny_model(family), tiny_model(family)
    layers = [layer for layer in layers_of(model) if layer.endswith(("to_q", "to_v", "norm_out.linear"))]
    found = adapted(model, layers, rank=2, dora=True)
    written(found, model, "kohya", tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors", back.networks(), keys_for(back))
    assert {*layers} <= {*read.layers}
    for layer in read.layers:
        expected = found.weight(layer) if layer in layers else keys_for(tiny_model(family)).module(layer).weight
        torch.testing.assert_close(read.weight(layer), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_have_names_in_comfyui_and_where_kohyas_scripts_train_them(family, tmp_path):
    model, back = tiny_model(family), tiny_model(family)
    layers = {
        component: [
            f"{component}.{name}"
            for name, layer in model.networks()[component].named_modules()
            if isinstance(layer, nn.Linear)
            and name.endswith(("layers.0.self_attn.q_proj", "SelfAttention.q", "mlp.fc1"))
        ]
        for component in model.of("text")
    }
    named = [layer for found in layers.values() for layer in found if "visual" not in layer]
    assert all(any(layer in found for layer in named) for found in layers.values())
    found = adapted(model, named)
    for kind in ("kohya", "diff"):
        if kind == "kohya" and not set(layers) <= keys_for(model).ENCODERS.keys():
            with pytest.raises(UserError, match=r"scripts have no name for 'text_encoder.*: export as diff"):
                written(found, model, kind, tmp_path / f"{kind}.safetensors")
            continue
        written(found, model, kind, tmp_path / f"{kind}.safetensors")
        read = read_lora(tmp_path / f"{kind}.safetensors", back.networks(), keys_for(back))
        assert sorted(read.layers) == sorted(named)
        for layer in named:
            torch.testing.assert_close(read.change(layer)[0], found.change(layer)[0], rtol=1e-4, atol=1e-6)
        read.detach()
    stems = {".".join(key.split(".")[1:4]) for key in load_file(tmp_path / "diff.safetensors")}
    assert stems == {*ENCODERS[family].split()}


ENCODERS = {
    "sd3": "clip_l.transformer.text_model clip_g.transformer.text_model t5xxl.transformer.encoder",
    "flux": "clip_l.transformer.text_model t5xxl.transformer.encoder",
    "flux2": "qwen3_4b.transformer.model",
    "z_image": "qwen3_4b.transformer.model",
    "qwen_image": "qwen25_7b.transformer.model",
    "krea2": "qwen3vl_4b.transformer.model",
    "chroma": "t5xxl.transformer.encoder",
    "auraflow": "pile_t5xl.transformer.encoder",
    "lumina2": "gemma2_2b.transformer.model",
    "pixart": "t5xxl.transformer.encoder",
    "ernie_image": "ministral3_3b.transformer.model",
    "ideogram4": "qwen3vl_8b.transformer.model",
    "hidream": "clip_l.transformer.text_model clip_g.transformer.text_model t5xxl.transformer.encoder "
    "llama.transformer.model",
}


def test_flux2s_encoder_is_called_by_what_it_is():
    layer = "text_encoder.model.layers.0.mlp.up_proj"
    klein, dev = tiny_model("flux2"), tiny_model("flux2", dev=True)
    klein.pipe.text_encoder.config.hidden_size = 4096
    assert list(keys_for(klein).comfy([layer])) == ["text_encoders.qwen3_8b.transformer.model.layers.0.mlp.up_proj"]
    assert list(keys_for(dev).comfy(["text_encoder.model.language_model.layers.0.mlp.up_proj"])) == [
        "text_encoders.mistral3_24b.transformer.model.layers.0.mlp.up_proj"
    ]


# ----------------------------------------------------------------------------------------------------------- diffusers


def loaded_by_diffusers(family, path):
    """A tiny pipeline into which diffusers has merged a file."""
    other = tiny_model(family)
    other.pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    return other


def drawn(model):
    return model.draw([Request(prompt="a red circle", seed=1)], steps=2, guidance=model.guidance(3.0))


READ = ("flux", "flux2", "z_image", "qwen_image", "chroma")


@pytest.mark.parametrize("family", READ)
def test_diffusers_draws_the_same_with_kohyas_file_and_leaves_out_what_is_said(family, tmp_path):
    model, clean = tiny_model(family), tiny_model(family)
    layers = layers_of(model)
    if family in ("flux", "chroma"):
        # Its converter knows the published widths of one layer by heart, and stops at files with Chroma's approximator.
        unfit = [n for name, (n, _) in keys_for(model).own.items() if "linear1" in name or "distilled" in name]
        layers = [layer for layer in layers if not any(layer in parts for parts in unfit)]
    found = adapted(model, layers)
    done = written(found, model, "kohya", tmp_path / "a.safetensors")
    said = next((note for note in done.notes if note.startswith("diffusers has no place for ")), "")
    left = said.removeprefix("diffusers has no place for ").partition(":")[0].split(", ") if said else []
    other = loaded_by_diffusers(family, tmp_path / "a.safetensors")
    other.pipe.fuse_lora(components=["transformer"])
    other.pipe.unload_lora_weights()
    for layer in layers:
        change = keys_for(other).module(layer).weight - keys_for(clean).module(layer).weight
        expected = found.change(layer)[0] * (layer not in left)
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=layer: f"{n} {m}")
    found.detach()
    found = adapted(model, [layer for layer in layers if layer not in left])
    written(found, model, "kohya", tmp_path / "b.safetensors")
    np.testing.assert_allclose(
        drawn(loaded_by_diffusers(family, tmp_path / "b.safetensors")), drawn(model), rtol=0, atol=1e-4
    )
    assert abs(drawn(clean) - drawn(model)).max() > 1e-3


JOINT = {
    "flux": (FluxPipeline, "single_blocks.0.linear1", "lora_unet_single_blocks_0_linear1"),
    "ideogram4": (Ideogram4Pipeline, "layers.0.attention.qkv", "diffusion_model.layers.0.attention.qkv"),
}


@pytest.mark.parametrize("family", JOINT)
def test_diffusers_cuts_joint_layers_at_the_published_widths(family):
    (cls, config), (pipeline, name, stem) = WIDE[family], JOINT[family]
    with torch.device("meta"):
        transformer = cls(**config)
    keys = keys_of(family, {"transformer": transformer})
    parts = {
        layer: Factors(torch.randn(2, keys.module(layer).in_features), torch.randn(keys.module(layer).out_features, 2))
        for layer in keys.own[name].layers
    }
    made = joined(keys.own[name], parts, keys)
    tensors = {
        f"{stem}.lora_down.weight": made.down,
        f"{stem}.lora_up.weight": made.up,
        f"{stem}.alpha": torch.tensor(float(made.rank)),
    }
    found = pipeline.lora_state_dict(tensors)
    assert len(found) == 2 * len(parts)
    for layer, part in parts.items():
        up, down = (found[f"{layer}.lora_{half}.weight"] for half in "BA")
        used = up.any(0)
        assert torch.equal(up[:, used], part.up) and torch.equal(down[used], part.down)


def test_diffusers_leaves_out_t5_of_kohyas_files_of_flux(tmp_path):
    model, clean = tiny_model("flux"), tiny_model("flux")
    clip = [f"text_encoder.encoder.layers.1.self_attn.{name}_proj" for name in ("v", "out")]
    t5 = "text_encoder_2.encoder.block.1.layer.0.SelfAttention.v"
    found = adapted(model, [*clip, t5])
    done = written(found, model, "kohya", tmp_path / "a.safetensors")
    assert f"diffusers has no place for {t5}: use --format diffusers" in done.notes
    other = loaded_by_diffusers("flux", tmp_path / "a.safetensors")
    other.pipe.fuse_lora(components=["text_encoder"])
    other.pipe.unload_lora_weights()
    for layer in (*clip, t5):
        expected = keys_for(clean).module(layer).weight + found.change(layer)[0] * (layer != t5)
        torch.testing.assert_close(keys_for(other).module(layer).weight, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*READ, "pixart"}))
def test_of_kohyas_files_of_others_diffusers_reads_nothing(family, tmp_path):
    model = tiny_model(family)
    done = written(adapted(model, layers_of(model)), model, "kohya", tmp_path / "a.safetensors")
    assert "diffusers reads none of it: use --format diffusers" in done.notes
    np.testing.assert_array_equal(
        drawn(loaded_by_diffusers(family, tmp_path / "a.safetensors")), drawn(tiny_model(family))
    )


# -------------------------------------------------------------------------------------------------------------- import

A_B = (".lora_A.weight", ".lora_B.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
DOTTED = ("diffusion_model.", "transformer.", "base_model.model.", "transformer.base_model.model.", "")
FLAT = ("lora_unet_", "lycoris_", "lora_transformer_")


def lora(keys, table, name_of, endings, alpha=None):
    """A file of the layers of a table, with factors of rank 2 that fill every row; and what each of ours changes by."""
    rng, tensors, changes = torch.Generator().manual_seed(4), {}, {}
    for name, native in table.items():
        base = whole(native, [keys.module(layer).weight.detach() for layer in native.layers])
        down = torch.randn(2, *base.shape[1:], generator=rng)
        up = torch.randn(len(base), 2, *[1] * (base.dim() - 2), generator=rng)
        tensors |= {name_of(name) + endings[0]: down, name_of(name) + endings[1]: up}
        if alpha is not None:
            tensors[name_of(name) + ".alpha"] = torch.tensor(alpha)
        scale = 1.0 if alpha is None else alpha / 2
        change = scale * (up.flatten(1) @ down.flatten(1)).view_as(base)
        changes |= apart(native, change, keys)
    return tensors, changes


def apart(native, change, keys):
    change = change.roll(len(change) // 2, 0) if native.swapped else change
    rows = [len(keys.module(layer).weight) for layer in native.layers]
    return dict(zip(native.layers, change.split(rows), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("own", [True, False])
def test_a_file_of_any_tool_acts_as_it_does_there(family, own, tmp_path):
    model = tiny_model(family)
    keys = keys_for(model)
    table = keys.own if own else keys.plain()
    for prefix in (*DOTTED, *FLAT):
        if prefix in FLAT:
            tensors, changes = lora(keys, table, lambda name, p=prefix: p + name.replace(".", "_"), DOWN_UP, alpha=3.0)
        else:
            tensors, changes = lora(keys, table, lambda name, p=prefix: p + name, A_B)
        save_file(tensors, tmp_path / "a.safetensors")
        found = read_lora(tmp_path / "a.safetensors", model.networks(), keys)
        assert found.method == "lora" and sorted(found.layers) == sorted(changes)
        for layer, change in changes.items():
            torch.testing.assert_close(found.change(layer)[0], change, rtol=1e-4, atol=1e-5)
        found.detach()


@pytest.mark.parametrize("part", ["loha", "lokr", "diff", "oft"])
def test_other_kinds_of_changes_of_joint_layers_are_cut_apart(part, tmp_path):
    """Q, k and v of a picture, and the last layer, whose halves are exchanged."""
    model = tiny_model("sd3")
    keys, rng = keys_for(model), torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    tensors, expected = {}, {}
    for name in ("joint_blocks.0.x_block.attn.qkv", "final_layer.adaLN_modulation.1"):
        native = keys.own[name]
        base = whole(native, [keys.module(layer).weight.detach() for layer in native.layers])
        rows, columns = base.shape
        stem = f"lora_unet_{name.replace('.', '_')}"
        if part == "loha":
            parts = {f"hada_w{i}_{x}": draw(*s) for i in (1, 2) for x, s in (("a", (rows, 2)), ("b", (2, columns)))}
            change = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        elif part == "lokr":
            parts = {"lokr_w1": draw(4, 4), "lokr_w2": draw(rows // 4, columns // 4)}
            change = torch.kron(parts["lokr_w1"], parts["lokr_w2"])
        elif part == "diff":
            parts = {"diff": draw(rows, columns), "diff_b": draw(rows)}
            change = parts["diff"]
        else:
            parts = {"oft_blocks": 0.1 * draw(4, rows // 4, rows // 4)}
            q = parts["oft_blocks"] - parts["oft_blocks"].mT
            one = torch.eye(rows // 4)
            turned = ((one + q) @ torch.linalg.inv(one - q)).mT.mT
            change = torch.einsum("knm,kn...->km...", turned, base.view(4, rows // 4, columns)).reshape_as(base) - base
        tensors |= {f"{stem}.{key}": value for key, value in parts.items()}
        expected |= {layer: (value, None) for layer, value in apart(native, change, keys).items()}
        if "diff_b" in parts:
            shifts = apart(native, parts["diff_b"], keys)
            expected |= {layer: (expected[layer][0], shifts[layer]) for layer in native.layers}
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors", model.networks(), keys)
    assert sorted(found.layers) == sorted(expected)
    for layer, (weight, shift) in expected.items():
        change, own = found.change(layer)
        torch.testing.assert_close(change, weight, rtol=1e-3, atol=1e-4)
        assert shift is None or torch.allclose(own, shift, atol=1e-5)


QKV, LINEAR1 = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"


def test_what_does_not_fit_a_joint_layer_is_said(tmp_path):
    model = tiny_model("flux")
    keys = keys_for(model)

    def refused(tensors, match):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=match):
            read_lora(tmp_path / "a.safetensors", model.networks(), keys)

    def factors(stem, rows):
        return {f"{stem}.lora_down.weight": torch.randn(2, 32), f"{stem}.lora_up.weight": torch.randn(rows, 2)}

    good = factors(QKV, 96)
    refused(
        good | factors("lora_unet_double_blocks_7_img_attn_qkv", 96), "such as 'lora_unet_double_blocks_7_img_attn_qkv"
    )
    refused(
        factors(QKV, 64), r"'transformer\.transformer_blocks\.0\.attn\.to_q \+ .*to_v' has a tensor of shape \(64, 2\)"
    )
    refused(
        good | factors("transformer.transformer_blocks.0.attn.to_k", 32), "both change 'transformer.*to_k': keep one"
    )
    refused({f"{QKV}.diff_b": torch.randn(95)}, "has a change of its bias that the model's layers do not take")
    refused({f"{LINEAR1}.lora_down.weight": torch.randn(2, 32)}, "has no up factor")
    assert not isinstance(model.denoiser.transformer_blocks[0].attn.to_q, type(attach))


def test_a_layer_without_a_part_in_the_model_has_no_name():
    """A native layer of which the model lacks a part is none of its layers."""
    model = tiny_model("flux")
    keys = keys_for(model)
    assert Native(("transformer.context_embedder",)) in keys.natives(["transformer.context_embedder"]).values()
    assert QKV not in keys.natives(["transformer.transformer_blocks.0.attn.to_q"])
