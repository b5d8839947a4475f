"""Every key that is exported is one that its reader has a place for, or is warned about by name.

The rules are facts of the readers' code: ComfyUI (`comfy/lora.py` at 41444b5: `model_lora_keys_unet`,
`model_lora_keys_clip`), sd-scripts 0.10.1 (`networks/lora.py`), LyCORIS 3.2.0 (`lycoris/kohya.py`). ComfyUI's names of
a UNet are those of its checkpoint, and diffusers' by counting blocks.
"""

from __future__ import annotations

import re

import pytest
import torch
from contracts.declared import declared
from safetensors.torch import load_file
from tiny import remade, tiny_model
from torch import nn

from visiontune import plugin
from visiontune.adapters import attach
from visiontune.errors import UserError
from visiontune.weights.export import export
from visiontune.weights.keys import keys_of
from visiontune.weights.keys.sd import ldm_names

FAMILIES = {"sd": {"text_encoder": "clip_l"}, "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}}
FACTORS = ("lora_down.weight", "lora_up.weight", "alpha")


def weighted(module):
    """Names of the layers with a weight."""
    return [name for name, layer in module.named_modules() if isinstance(getattr(layer, "weight", None), nn.Parameter)]


def comfyui(model, kind):
    """Stems of keys that ComfyUI has a place for."""
    unet, ldm, stems = model.networks()["unet"], ldm_names(model.networks()["unet"]), set()
    for name in weighted(unet):
        stems |= {f"lora_unet_{ldm[name].replace('.', '_')}"} if name in ldm else set()
        stems.add(f"lora_unet_{name.replace('.', '_')}")
    for number, (component, encoder) in enumerate(FAMILIES[kind].items(), 1):
        for name in weighted(model.networks()[component]):
            full = name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
            stems.add(f"text_encoders.{encoder}.transformer.{full}")
            if re.search(r"encoder\.layers\.\d+\.(mlp\.fc[12]|self_attn\.(q|k|v|out)_proj)$", full):
                stems |= {f"lora_te{number}_{full.replace('.', '_')}", f"lora_te_{full.replace('.', '_')}"}
            if full == "text_projection":
                stems.add(f"lora_te{number}_text_projection")
    return stems


def sd_scripts(model, kind):
    """Stems of keys that sd-scripts makes a LoRA for: what lies in modules of certain classes."""
    inside = {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D", "CLIPAttention", "CLIPMLP"}
    keys, stems = keys_of(kind, model.networks()), set()
    for component, network in model.networks().items():
        if component == "vae":
            continue
        for outer, module in network.named_modules():
            if type(module).__name__ in inside:
                for name, layer in module.named_modules():
                    if isinstance(layer, nn.Linear | nn.Conv2d):
                        stems |= set(keys.kohya([f"{component}.{outer}.{name}"]))
    return stems


def adapted(kind, name, preset="all", /, **options):
    model = tiny_model(kind)
    if kind == "sdxl":
        model.pipe.unet = remade(model.pipe.unet, norm_num_groups=4)
    names = model.names(["denoiser", "text"])
    found = attach(model.of(*names), name, targets=preset, presets=model.presets(names), **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return model, found.eval()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"rank": 2}), ("lora", {"rank": 2, "dora": True}), ("oft", {"block_size": 4})]
)
def test_kohyas_files_have_a_place_in_each_reader_or_a_warning(kind, method, options, tmp_path):
    model, found = adapted(kind, method, **options)
    done = export(
        found,
        tmp_path / "a.safetensors",
        "kohya",
        dtype=torch.float32,
        keys=keys_of(kind, model.networks()),
        model=model,
    )
    known, scripts, warned = comfyui(model, kind), sd_scripts(model, kind), " ".join(done.notes)
    stems = keys_of(kind, model.networks()).kohya(found.layers)
    for key in load_file(done.path):
        stem, _, part = key.partition(".")
        (layer,) = stems[stem].layers
        assert part in FACTORS or (part == "dora_scale" and "dora_scale" in warned)
        assert stem in scripts or layer in re.findall(r"[\w.]+", warned), layer
        assert stem in known
    assert done.ranks.keys() == set(found.layers)
    assert ("unet.conv_in" in warned) and ("resnets" not in warned)


@pytest.mark.parametrize("kind", FAMILIES)
def test_comfyui_has_a_place_for_every_difference(kind, tmp_path):
    """Norms, embeddings and projections too, and what is zero is left out."""
    model, found = adapted(kind, "dense", ".*")
    keys = keys_of(kind, model.networks())
    done = export(found, tmp_path / "a.safetensors", "diff", dtype=torch.float32, keys=keys, model=model)
    saved, known = load_file(done.path), comfyui(model, kind)
    for key in saved:
        stem, _, part = key.rpartition(".")
        assert part in ("diff", "diff_b") and stem in known, key
    assert sum("text_encoders.clip_l.transformer.text_model.embeddings" in key for key in saved) == 2
    assert ("text_encoders.clip_g.transformer.text_projection.diff" in saved) == (kind == "sdxl")
    assert {stem for key in saved if (stem := key.rpartition(".")[0])} == set(keys.comfy(found.layers))
    back = keys.natives(found.layers)
    assert all(back[stem] == native for stem, native in keys.comfy(found.layers).items())


@pytest.mark.parametrize("method", list(declared()))
def test_every_methods_files_have_a_place(method, tmp_path):
    options = {**declared()[method].options, **declared()[method].export_options}
    model, found = adapted("sd", method, "attention", **options)
    keys, known, written = keys_of("sd", model.networks()), comfyui(model, "sd"), 0
    for kind, rank in (("kohya", 2), ("diff", None)):
        try:
            export(found, tmp_path / f"{kind}.safetensors", kind, dtype=torch.float32, keys=keys, rank=rank)
        except UserError as error:
            assert "export as diff" in str(error) or method == "ssf"
            continue
        for key in load_file(tmp_path / f"{kind}.safetensors"):
            stem, _, part = key.partition(".") if kind == "kohya" else key.rpartition(".")
            assert stem in known and part in (FACTORS if kind == "kohya" else ("diff", "diff_b")), key
            written += 1
    assert written or method == "ssf"


def test_bitfit_writes_its_biases_and_no_zeros(tmp_path):
    model, found = adapted("sd", "bitfit", "attention")
    done = export(found, tmp_path / "a.safetensors", "diff", dtype=torch.float32, keys=keys_of("sd", model.networks()))
    saved = load_file(done.path)
    assert sum(value.numel() for value in saved.values()) == found.parameter_count
    assert all(key.endswith(".diff_b") and value.any() for key, value in saved.items())
    found.scale = 0
    with pytest.raises(UserError, match="changes nothing at this strength"):
        export(found, tmp_path / "b.safetensors", "diff", dtype=torch.float32, keys=keys_of("sd", {}))
    assert not (tmp_path / "b.safetensors").exists()


def test_stable_diffusion_2_has_another_encoder():
    model = tiny_model("sd")
    text = model.networks()["text_encoder"]
    names = lambda: set(keys_of("sd", {"text_encoder": text}).comfy(["text_encoder.final_layer_norm"]))  # noqa: E731
    assert names() == {"text_encoders.clip_l.transformer.text_model.final_layer_norm"}
    text.config.hidden_size = 1024
    assert names() == {"text_encoders.clip_h.transformer.text_model.final_layer_norm"}


# What a format refuses is written by each of the formats that the message names.

MIDDLE = "mid_block.attentions.0.transformer_blocks.0"
TARGETS = {
    "with biases": {"unet": [f"{MIDDLE}.attn1.to_out.0", "conv_in"]},
    "without": {"unet": [f"{MIDDLE}.attn1.to_q", "conv_in"]},
    "norms": {"unet": [f"{MIDDLE}.norm2"], "text_encoder": ["embeddings.token_embedding"]},
    "text": {"text_encoder": ["encoder.layers.0.mlp.fc1", "encoder.layers.1.self_attn.q_proj"]},
}
HARD = {"ssf", "bitfit", "dense", "sara", "oft", "boft", "lora"}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("method", sorted(HARD))
def test_what_a_message_advises_works(method, targets, tmp_path):
    model, refused = tiny_model("sd"), 0
    kinds, networks = plugin.load("adapters", method).LAYERS, model.networks()
    chosen = {
        c: [n for n in names if isinstance(networks[c].get_submodule(n), kinds)]
        for c, names in TARGETS[targets].items()
    }
    used = {component: networks[component] for component, names in chosen.items() if names}
    if not used:
        pytest.skip(f"{method} adapts none of them")
    names = [name for found in chosen.values() for name in found]
    options = {**declared()[method].options, **({"create": True} if method == "bitfit" else {})}
    found = attach(used, method, targets=names, **options).eval()
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    common = {"dtype": torch.float32, "keys": keys_of("sd", networks), "model": model}
    advised = set()
    for kind in ("diffusers", "kohya", "diff", "peft", "merged"):
        try:
            if kind != "merged":
                export(found, tmp_path / f"{kind}.safetensors", kind, **common)
        except UserError as error:
            refused += 1
            line = str(error)
            assert "\n" not in line
            if "only visiontune can use it" in line:
                with pytest.raises(UserError, match="got a bias that the base's layer does not have"):
                    export(found, tmp_path / "x", "merged", **common)
                continue
            advised |= set(re.split(", | or ", line.partition("export as ")[2]))
    for kind in sorted(advised - {"merged"}):
        assert (tmp_path / f"{kind}.safetensors").exists()
    if "merged" in advised:
        export(found, tmp_path / "merged", "merged", **common)
    assert not refused or advised or method in ("ssf", "bitfit")
