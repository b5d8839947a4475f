"""What exported files say of themselves, and how far what they hold is from the change."""

from __future__ import annotations

import json

import pytest
import torch
from contracts.declared import turned
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_model
from torch import nn

from visiontune.adapters import attach
from visiontune.errors import UserError
from visiontune.weights import metadata
from visiontune.weights.export import export
from visiontune.weights.keys import keys_of

MUST = {"sai_model_spec", "architecture", "implementation", "title", "resolution"}


def header(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("kohya", "sd"),
        ("diffusers", "sd"),
        ("diff", "sdxl"),
        ("kohya", "sdxl"),
        ("diffusers", "sd3"),
        ("kohya", "flux"),
        ("diff", "qwen_image"),
    ],
)
def test_files_carry_what_others_show(kind, family, tmp_path):
    model = tiny_model(family)
    adapters = turned(
        attach(
            model.of(*model.names(["denoiser"])),
            "lora",
            targets="attention",
            rank=2,
            presets=model.presets(model.names(["denoiser"])),
        )
    )
    given = metadata.of_adapters(
        [
            {
                "method": "lora",
                "config": {"dora": False},
                "trigger": "sks",
                "base_model": "/home/me/models/my-base",
                "modelspec.title": "dog",
            }
        ],
        [0.5],
    )
    common = {"dtype": torch.float16, "keys": keys_of(family, model.networks()), "model": model, "metadata": given}
    export(adapters, tmp_path / "a.safetensors", kind, **common)
    found = header(tmp_path / "a.safetensors")
    assert {f"modelspec.{key}" for key in MUST} <= found.keys()
    assert found["modelspec.title"] == "dog" and found["modelspec.trigger_phrase"] == "sks"
    assert found["modelspec.resolution"] == f"{model.resolution}x{model.resolution}"
    assert found["ss_sd_model_name"] == "my-base" and "/home" not in str(found)
    assert json.loads(found["visiontune.adapters"]) == [{"method": "lora", "scale": 0.5, "title": "dog"}]
    named = {
        "sd": ("stable-diffusion-v1", "sd_v1"),
        "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
        "sd3": ("stable-diffusion-3", "sd3"),
        "flux": ("flux-1-dev", "flux1"),
        "qwen_image": ("Qwen-Image", "qwen_image"),
    }
    networks = {"sd3": "networks.lora_sd3", "flux": "networks.lora_flux"}
    architecture, version = named[family]
    assert found["ss_base_model_version"] == version
    assert found["modelspec.architecture"] == f"{architecture}/{'diff' if kind == 'diff' else 'lora'}"
    if kind != "diff":
        assert found["ss_network_dim"] == "2" and found["ss_network_module"] == networks.get(family, "networks.lora")
        assert found["ss_network_alpha"] == ("1.0" if kind == "kohya" and family in ("sd", "sdxl") else "2")
    export(adapters, tmp_path / "again" / "a.safetensors", kind, **common)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "again" / "a.safetensors").read_bytes()


def test_what_several_adapters_say():
    one = {"method": "lora", "config": {"dora": True}, "trigger": "sks", "resolution": "64", "base_model": "pocket/sd"}
    two = {"method": "oft", "config": {"coft": False}, "trigger": "inky", "base_model": "pocket/sd"}
    found = metadata.of_adapters([one, two], [1.0, -0.4])
    assert found["modelspec.trigger_phrase"] == "sks, inky" and found["modelspec.resolution"] == "64x64"
    assert found["ss_sd_model_name"] == "pocket/sd"
    sources = json.loads(found["visiontune.adapters"])
    assert [(s["method"], s["scale"]) for s in sources] == [("dora", 1.0), ("oft", -0.4)]


# ------------------------------------------------------------------------------------------------ what is written


def small(method="lora", size=1e-7, **options):
    """A layer whose change has entries of about ``size``."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32))
    adapters = attach({"unet": net}, method, targets=["0"], **options).eval()
    with torch.no_grad():
        for name, p in adapters.tensors().items():
            p.normal_(std=size if name.endswith(("up", "change", "weight", "delta")) else 1 / 4)
    return net, adapters


def product(adapters, layer="unet.0"):
    """The change of a LoRA, which float32 cannot tell from the base's rounding."""
    up, down = (adapters.tensors()[f"{layer}.{name}"].detach().double() for name in ("up", "down"))
    return up @ down


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_stated_error_is_that_of_the_rounded_file(kind, dora, dtype, tmp_path):
    net, adapters = small(rank=3, dora=dora)
    done = export(adapters, tmp_path / "a.safetensors", kind, dtype=dtype, keys=keys_of("sd", {}))
    saved = {key.partition("0.")[2]: value.double() for key, value in load_file(done.path).items()}
    up, down = (
        next(v for k, v in saved.items() if k.startswith(names))
        for names in (("lora_B", "lora_up"), ("lora_A", "lora_down"))
    )
    change = up @ down / (3 if kind == "kohya" else 1)
    if dora:
        lengths = next(v for k, v in saved.items() if "magnitude" in k or "dora_scale" in k).flatten()[:, None]
        v = net[0].weight.double() + change
        change = lengths * v / v.norm(dim=1, keepdim=True) - net[0].weight.double()
    wanted = adapters.change("unet.0")[0].double() if dora else product(adapters)
    off = float((change - wanted).norm() / wanted.norm())
    assert done.worst == pytest.approx(off, rel=1e-2)
    # Balanced factors keep the digits of the format however small the change is; lengths those of float32.
    assert off < (2e-3 if dora else 1e-3) * (8 if dtype is torch.bfloat16 else 1) * (4 if dora else 1)


def test_a_difference_too_small_for_its_format_is_said(tmp_path):
    _, adapters = small(rank=3)
    for dtype, bad in ((torch.float16, True), (torch.bfloat16, False), (torch.float32, False)):
        done = export(adapters, tmp_path / "a.safetensors", "diff", dtype=dtype, keys=keys_of("sd", {}))
        saved, wanted = load_file(done.path)["lora_unet_0.diff"], product(adapters)
        assert done.worst == pytest.approx(float((saved.double() - wanted).norm() / wanted.norm()), rel=1e-3, abs=1e-12)
        assert (done.worst > 0.05) is bad
        assert any("too coarse" in note for note in done.notes) is bad


def test_what_a_format_has_no_number_for_is_not_written(tmp_path):
    _, adapters = small(size=1e6, rank=3)
    common = {"dtype": torch.float16, "keys": keys_of("sd", {})}
    with pytest.raises(UserError, match=r"'lora_unet_0\.diff' is not finite in float16: write it by --dtype fp32"):
        export(adapters, tmp_path / "a.safetensors", "diff", **common)
    assert not list(tmp_path.iterdir())
    assert export(adapters, tmp_path / "a.safetensors", "diffusers", **common).worst < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_merged_model_is_off_by_what_rounding_makes_of_its_weights(dtype, tmp_path):
    model = tiny_model("sd")
    adapters = attach({"unet": model.denoiser}, "lora", targets="attention", rank=2)
    turned(adapters, 0.01)
    wanted = {layer: product(adapters, layer) for layer in adapters.layers}
    base = {layer: adapters.layer(layer).weight.detach().double() for layer in adapters.layers}
    done = export(adapters, tmp_path / "m", "merged", dtype=dtype, model=model)
    unet = StableDiffusionPipeline.from_pretrained(tmp_path / "m", torch_dtype=dtype).unet
    off = {}
    for layer, change in wanted.items():
        written = unet.get_submodule(layer.removeprefix("unet.")).weight.detach().double()
        off[layer] = float((written - base[layer] - change).norm() / change.norm())
    assert done.errors == pytest.approx(off, rel=1e-3, abs=1e-6)
    assert (done.worst > 1e-2) is (dtype is torch.float16) is bool(done.notes)
