"""``visiontune export``: files that diffusers loads, a merged model, and what it refuses."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from visiontune.adapters import attach, load, read_header


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
def test_a_lora_file_says_what_it_leaves_out(cli, adapter, tmp_path, kind, tiny_folder) -> None:
    path, weights = adapter
    result = cli("export", path, "lora.safetensors", "--format", kind, "--scale", 0.5, "--dtype", "fp32")
    assert result.code == 0
    assert "leaves out 0.00%" in result.out
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, p in pipe.unet.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-3, atol=1e-5)
    thin = cli("export", path, "thin.safetensors", "--format", kind, "--rank", 1)
    assert "ranks 1 to 1" in thin.out
    assert "leaves out 0.00%" not in thin.out


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
        (("export", path, "a.safetensors", "--rank", 0), "--rank must be at least 1"),
    ):
        result = cli(*words)
        assert result.code == 2
        assert message in result.err
        assert result.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


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
        ((path, "a.safetensors"), "keys belong to no layer of this model"),
        ((tiny_folder, "a.safetensors"), "no readable adapter_config.json"),
        ((tiny_folder, "a.safetensors", "--component", "transformer"), "has no component 'transformer'"),
    ):
        result = cli("import", *words, "--model", tiny_folder)
        assert result.code == 2
        assert message in result.err
        assert "Traceback" not in result.err
    assert sorted(tmp_path.iterdir()) == before
