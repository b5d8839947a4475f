"""Adapters of any origin by one call."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model

from visiontune import adapters
from visiontune.errors import UserError
from visiontune.weights.export import export
from visiontune.weights.keys import keys_of
from visiontune.weights.reading import read, read_foreign

LAYER = "layers.1.attention.to_q"


def changed(model, target="attention.to_q"):
    made = adapters.attach(model.of("denoiser"), "lora", targets=[target], rank=2)
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return made


@pytest.mark.parametrize("kind", ["own", "diffusers", "peft"])
def test_files_and_folders_are_read_as_what_they_are(kind, tmp_path):
    model = tiny_model("z_image")
    made = changed(model)
    place = tmp_path / ("folder" if kind == "peft" else "file.safetensors")
    if kind == "own":
        made.save(place)
    else:
        export(made, place, kind, dtype=torch.float32, model=model, keys=keys_of(model.family, model.networks()))
    expected = {name: made.change(name)[0] for name in made.layers}
    made.detach()
    found = read(place, model.networks(), model.family, "transformer", "under")
    assert found.name == "under" and not found.training
    for name, change in expected.items():
        torch.testing.assert_close(found.change(name)[0], change, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "", "base_model.model."])
def test_the_layers_of_a_denoiser_go_by_several_prefixes(prefix, tmp_path):
    model = tiny_model("z_image")
    weight = model.denoiser.get_submodule(LAYER).weight
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    file = tmp_path / "lora.safetensors"
    save_file({f"{prefix}{LAYER}.lora_A.weight": down, f"{prefix}{LAYER}.lora_B.weight": up}, file)
    found = read(file, model.networks(), model.family, "transformer")
    torch.testing.assert_close(found.change(f"transformer.{LAYER}")[0], up @ down)


def test_what_is_not_there_or_ones_own_is_refused(tmp_path):
    model = tiny_model("z_image")
    made = changed(model)
    own = made.save(tmp_path / "own.safetensors")
    export(made, tmp_path / "folder", "peft", dtype=torch.float32, model=model)
    made.detach()
    with pytest.raises(UserError, match="is an adapter of visiontune already"):
        read_foreign(own, model.networks(), model.family, "transformer")
    with pytest.raises(UserError, match="no component 'unet'; it has transformer, vae, text_encoder"):
        read_foreign(tmp_path / "folder", model.networks(), model.family, "unet")
