"""``visiontune export``: files that diffusers loads, a merged model, and what it refuses."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from visiontune.adapters import attach, load, read_header
from visiontune.models.sd import StableDiffusion
from visiontune.weights.formats import peft as peft_format


@pytest.fixture
def adapter(tmp_path, tiny_folder):
    """An OFT file of the tiny model, and the model's UNet weights with it merged at half strength."""
    model = tiny_model()
    adapters = attach({"unet": model.denoiser}, "oft", targets="attention", block_size=4)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    path = adapters.save(tmp_path / "adapter.safetensors", {"base_model": str(tiny_folder)})
    adapters.scale = 0.5
    adapters.merge()
    return path, {name: p.detach().clone() for name, p in model.denoiser.named_parameters()}


def test_a_merged_model_is_a_plain_diffusers_folder(cli, adapter, tmp_path) -> None:
    path, weights = adapter
    result = cli("export", path, "merged", "--format", "merged", "--scale", 0.5, "--dtype", "fp32")
    assert result.code == 0
    assert "merged" in result.out
    unet = StableDiffusionPipeline.from_pretrained(tmp_path / "merged").unet
    for name, p in unet.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name])


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_a_lora_file_says_how_far_it_is_off(cli, adapter, tmp_path, kind, tiny_folder) -> None:
    path, weights = adapter
    result = cli("export", path, "lora.safetensors", "--format", kind, "--scale", 0.5, "--dtype", "fp32")
    assert result.code == 0
    assert "off by 0.00%" in result.out
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, p in pipe.unet.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-3, atol=1e-5)
    thin = cli("export", path, "thin.safetensors", "--format", kind, "--rank", 1)
    assert "ranks 1 to 1" in thin.out
    assert "off by 0.00%" not in thin.out


def moved(model, method, path, seed, targets="attention", **options):
    """A file of an adapter that has moved; the model is left without it."""
    made = attach({"unet": model.denoiser}, method, targets=targets, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    made.save(path)
    made.detach()
    return path


@pytest.mark.parametrize(("second", "targets"), [("lora", "attention"), ("oft", ["to_q", "conv1"])])
@pytest.mark.parametrize("kind", ["diffusers", "kohya", "diff", "merged"])
def test_several_adapters_become_what_they_are_together(cli, tmp_path, tiny_folder, second, targets, kind) -> None:
    """Where both change a layer, the second acts on what the first made of it."""
    model = tiny_model()
    one = moved(model, "lora", tmp_path / "one.safetensors", 0, rank=2)
    options = {"rank": 3} if second == "lora" else {"block_size": 4}
    two = moved(model, second, tmp_path / "two.safetensors", 1, targets, **options)
    for i, (file, scale) in enumerate(((one, 0.7), (two, -0.4))):
        load(model.networks(), file, name=str(i)).scale = scale
    out = "out" if kind == "merged" else "out.safetensors"
    words = ("--scale", 0.7, "--scale", -0.4, "--format", kind, "--dtype", "fp32", "--model", tiny_folder)
    result = cli("export", one, two, out, *words)
    assert result.code == 0, result.err
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / out if kind == "merged" else tiny_folder)
    if kind == "diff":
        for name, value in load_file(tmp_path / out).items():
            layer = next(n for n, _ in pipe.unet.named_modules() if f"lora_unet_{n.replace('.', '_')}.diff" == name)
            pipe.unet.get_submodule(layer).weight.data += value
    elif kind != "merged":
        pipe.load_lora_weights(str(tmp_path), weight_name=out)
        assert json.loads(header(tmp_path / out)["visiontune.adapters"])[1] == {"method": second, "scale": -0.4}
    other = StableDiffusion(pipe)
    torch.testing.assert_close(unet_output(other), unet_output(model), rtol=1e-4, atol=2e-5)
    assert not torch.allclose(unet_output(tiny_model()), unet_output(model), atol=1e-3)


def header(path) -> dict:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_downloaded_adapter_has_no_code_run_unless_it_is_trusted(cli, adapter, tmp_path) -> None:
    path, _ = adapter
    (tmp_path / "mine.py").write_text("from visiontune.adapters.oft import *\nopen('ran', 'w')\n")
    header = {k: v if isinstance(v, str) else json.dumps(v) for k, v in read_header(path).items()}
    save_file(load_file(path), path, header | {"method": "mine.py"})
    words = ("prompts=[a]", "seeds=1", "steps=1", f"adapter={path}")
    for command in (("export", path, "out", "--format", "merged"), ("sample", *words, "out=drawn")):
        result = cli(*command)
        assert (result.code, result.out) == (2, "")
        assert "'mine.py', which is none of visiontune's own" in result.err
        assert not (tmp_path / "ran").exists()
    assert cli("export", path, "out", "--format", "merged", "--trust", "mine.py").code == 0
    assert (tmp_path / "ran").exists()
    assert cli("sample", *words, "out=drawn", "trust=[mine.py]").code == 0


def test_the_base_of_a_downloaded_adapter_is_not_fetched_unasked(cli, adapter, monkeypatch) -> None:
    path, _ = adapter
    header = {k: v if isinstance(v, str) else json.dumps(v) for k, v in read_header(path).items()}
    save_file(load_file(path), path, header | {"base_model": "owner/name"})
    asked = []

    def model_info(self, repo_id, **kwargs):
        asked.append(repo_id)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    drawing = ("sample", f"adapter={path}", "prompts=[a]", "seeds=1", "steps=1", "out=drawn")
    for command, option in ((("export", path, "a.safetensors"), "--model=owner/name"), (drawing, "model=owner/name")):
        refused = cli(*command)
        assert refused.code == 2 and "'owner/name' is not on this machine" in refused.err and asked == []
        assert "cannot be fetched" in cli(*command, option).err and asked == ["owner/name"]
        asked.clear()


def test_what_export_refuses(cli, adapter, tmp_path) -> None:
    path, _ = adapter
    before = sorted(tmp_path.iterdir())
    for words, message in (
        (("export", "nowhere", "a.safetensors"), "there is no adapter file or run folder 'nowhere'"),
        (("export", path, "a.bin"), "diffusers is written to a .safetensors file"),
        (("export", path, path), "exists: name another output"),
        (
            ("export", path, "a.safetensors", "--rank", 0),
            "argument --rank: must be a whole number from 1 to 16384, not '0'",
        ),
        (("export", path, "a.safetensors", "--rank", 2, "--format", "diff"), "leave --rank out"),
        (("export", path, "a.safetensors", "--component", "unet"), "leave --component out"),
        (("export", path, "a.safetensors", "--scale", 1, "--scale", 2), "2 --scale for 1 adapters"),
        (("export", path, "a.safetensors", "--scale", "nan"), "argument --scale: must be a number from -100 to 100"),
    ):
        result = cli(*words)
        assert result.code == 2
        assert message in result.err
        assert result.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_peft_folder_is_for_a_component(cli, tmp_path, tiny_folder) -> None:
    model = tiny_model()
    adapters = attach(model.of("unet", "text_encoder"), "lora", targets=["to_q", "q_proj"], rank=2)
    path = adapters.save(tmp_path / "adapter.safetensors", {"base_model": str(tiny_folder)})
    words = ("export", path, "folder", "--format", "peft")
    refused = cli(*words)
    assert refused.code == 2 and "holds one component (--component), not text_encoder, unet: export as" in refused.err
    assert "has no component 'vae'; it has text_encoder, unet" in cli(*words, "--component", "vae").err
    done = cli(*words, "--component", "unet")
    assert done.code == 0 and "not written: text_encoder; each needs a folder of its own" in done.out
    kept = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())["target_modules"]
    assert kept and all(f"unet.{name}" in adapters.layers for name in kept)


def test_a_peft_folder_without_peft_is_one_line(cli, tmp_path, tiny_folder, monkeypatch) -> None:
    adapters = attach(tiny_model().of("unet"), "lora", targets=["to_q"], rank=2)
    path = adapters.save(tmp_path / "adapter.safetensors", {"base_model": str(tiny_folder)})
    monkeypatch.setattr(peft_format.importlib.util, "find_spec", lambda name: None)
    refused = cli("export", path, "folder", "--format", "peft")
    assert refused.code == 2 and "is not installed: pip install 'visiontune[peft]'" in refused.err


def test_an_adapter_without_a_base_needs_one(cli, tmp_path, tiny_folder) -> None:
    adapters = attach({"unet": tiny_model().denoiser}, "lora", rank=2)
    path = adapters.save(tmp_path / "adapter.safetensors")
    assert "name the base with --model" in cli("export", path, "a.safetensors").err
    assert cli("export", path, "a.safetensors", "--model", tiny_folder).code == 0


def unet_output(model) -> torch.Tensor:
    cond = model.embed(["a red circle"])
    with torch.no_grad():
        return model.predict(torch.ones(1, 4, 8, 8), torch.tensor([400]), cond)


@pytest.mark.parametrize("words", [("peft_folder", "--format", "peft"), ("lora.safetensors", "--format", "kohya")])
def test_what_was_exported_can_be_imported(cli, tmp_path, tiny_folder, words) -> None:
    model = tiny_model()
    before = unet_output(model)
    adapters = attach({"unet": model.denoiser}, "lora", targets="attention", rank=3)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    path = adapters.save(tmp_path / "adapter.safetensors", {"base_model": str(tiny_folder)})
    assert cli("export", path, *words, "--dtype", "fp32").code == 0
    result = cli("import", words[0], "back.safetensors", "--model", tiny_folder, "--trigger", "sks")
    assert result.code == 0
    assert "lora on" in result.out
    other = tiny_model()
    load(other.networks(), tmp_path / "back.safetensors")
    torch.testing.assert_close(unet_output(other), unet_output(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, unet_output(model), atol=1e-3)
    assert read_header(tmp_path / "back.safetensors")["trigger"] == "sks"


def test_what_import_refuses(cli, adapter, tmp_path, tiny_folder) -> None:
    path, _ = adapter
    before = sorted(tmp_path.iterdir())
    for words, message in (
        (("nowhere", "a.safetensors"), "there is no nowhere"),
        ((path, "a.bin"), "an adapter is a .safetensors file"),
        ((path, path), "exists: name another output"),
        ((path, "a.safetensors"), "is an adapter of visiontune already"),
        ((tiny_folder, "a.safetensors"), "there is no adapter_config.json of PEFT's folder"),
        ((tiny_folder, "a.safetensors", "--component", "transformer"), "has no component 'transformer'"),
    ):
        result = cli("import", *words, "--model", tiny_folder)
        assert result.code == 2
        assert message in result.err
        assert "Traceback" not in result.err
    assert sorted(tmp_path.iterdir()) == before
