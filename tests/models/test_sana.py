"""What Sana has of its own: an instruction before prompts, latents without a distribution, convolutions in groups."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import remade, save_tiny, tiny_model, tiny_pipe

from visiontune import models
from visiontune.adapters import attach
from visiontune.core import Condition
from visiontune.errors import UserError
from visiontune.models.sana import Sana
from visiontune.weights.export import export


def test_prompts_are_read_after_an_instruction_and_what_is_guided_away_from_without():
    model = tiny_model("sana")
    cond, plain = model.embed(["A red CIRCLE "]), model.embed(["a red circle"], negative=True)
    assert cond.tokens.shape == plain.tokens.shape == (1, 300, 16)
    assert cond.mask.sum() == plain.mask.sum() == 4
    torch.testing.assert_close(cond.tokens[:, 0], plain.tokens[:, 0])
    assert not torch.allclose(cond.tokens[:, 1:4], plain.tokens[:, 1:4], atol=1e-2)
    assert torch.equal(cond.tokens, model.embed(["a red circle"]).tokens)
    assert torch.equal(model.unconditional(2).tokens, model.embed(["", ""], negative=True).tokens)


def test_a_prompt_is_cut_at_300_tokens():
    model = tiny_model("sana")
    whole = "a " * 299
    assert model.reader.cut([whole + "a"]) == {whole + "a": 301}
    assert not model.reader.cut([whole])
    for negative in (False, True):
        more, same, fewer = (
            model.embed([text], negative=negative).tokens for text in (whole + "a red circle", whole, whole[2:])
        )
        assert torch.equal(more, same) and not torch.equal(fewer, same)


def test_latents_have_no_deviation_and_sampling_changes_nothing():
    model = tiny_model("sana")
    pixels = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.moments(pixels).chunk(2, dim=1)
    assert not std.any() and mean.std() > 0.1
    assert torch.equal(model.encode(pixels), model.encode(pixels, sample=False))
    torch.testing.assert_close(model.encode(pixels), mean * 0.41407)


def test_the_network_is_told_times_on_its_own_scale():
    model = tiny_model("sana")
    x_t, cond = torch.randn(1, 4, 8, 8), model.embed(["a red circle"])
    expected = model.predict(x_t, torch.tensor([250.0]), cond)
    weights = model.denoiser.state_dict()
    model.pipe.transformer = remade(model.denoiser, timestep_scale=0.5)
    model.denoiser.load_state_dict(weights)
    torch.testing.assert_close(model.predict(x_t, torch.tensor([500.0]), cond), expected)


def test_sides_are_multiples_of_32_whatever_the_autoencoder():
    model = tiny_model("sana")
    assert (model.downsample, model.unit, model.resolution) == (4, 32, 32)
    model.pipe.transformer = remade(model.denoiser, patch_size=16)
    assert Sana(model.pipe).unit == 64


def test_a_lora_of_a_convolution_in_groups_is_exported_as_merged_alone(tmp_path):
    model = tiny_model("sana")
    adapters = attach(model.of("denoiser"), "lora", targets=["conv_depth"], rank=2)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1)
    options = {"dtype": torch.float32, "model": model}
    for kind in ("diffusers", "peft"):
        with pytest.raises(UserError, match=r"conv_depth' is a convolution in groups, .*: export as merged"):
            export(adapters, tmp_path / "a.safetensors", kind, **options)
    x_t, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), model.embed(["a"])
    expected = model.predict(x_t, t, cond)
    export(adapters, tmp_path / "m", "merged", **options)
    torch.testing.assert_close(models.load(str(tmp_path / "m")).predict(x_t, t, cond), expected, rtol=0, atol=1e-5)


def test_sprint_and_what_is_no_sana_are_refused(tmp_path):
    pipe = tiny_pipe("sana")
    pipe.transformer = remade(pipe.transformer, guidance_embeds=True)
    with pytest.raises(UserError, match=r"it is distilled \(Sana-Sprint\)"):
        Sana(pipe)
    pipe.transformer = remade(tiny_pipe("sana").transformer, in_channels=9)
    with pytest.raises(UserError, match="its transformer takes 9 channels and gives 4"):
        Sana(pipe)
    pipe = tiny_pipe("sana")
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="its scheduler is not one of flow"):
        Sana(pipe)
    folder = save_tiny(tmp_path / "sprint", "sana")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "SanaSprintPipeline"}))
    with pytest.raises(UserError, match=r"class SanaSprintPipeline; supported: .*, of which SanaPipeline is nearest$"):
        models.load(str(folder))
    with pytest.raises(ValueError, match="make the Condition with embed"):
        model = tiny_model("sana")
        model.predict(torch.ones(1, 4, 8, 8), torch.tensor([1]), Condition(tokens=model.embed(["a"]).tokens))
