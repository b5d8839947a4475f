"""Adapters of both towers of a CLIP as one PEFT folder of the whole model, out and back."""

from __future__ import annotations

import pytest
import torch
from contracts.declared import turn
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_rewards import TOWERS
from transformers import AutoModel

from visiontune import adapters, models
from visiontune.errors import UserError
from visiontune.weights.export import export
from visiontune.weights.reading import read_foreign


@pytest.fixture(scope="module", params=TOWERS)
def folder(request, tmp_path_factory):
    return TOWERS[request.param](tmp_path_factory.mktemp(request.param) / "model", 16)


def adapted(folder, method="lora", targets=("q_proj", "fc1"), **options):
    model = models.load(str(folder))
    found = adapters.attach(model.of("vision", "text"), method, targets=list(targets), **options)
    turn(found, 0.2)
    return model, found.eval()


@torch.no_grad()
def pooled(module, folder):
    """Of a picture and a text, by the stock model."""
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    ids = torch.arange(1, 17)[None]
    return torch.cat(
        [
            module.get_image_features(pixel_values=pixels).pooler_output,
            module.get_text_features(input_ids=ids).pooler_output,
        ]
    )


@pytest.mark.parametrize(
    ("method", "options", "rank"),
    [("lora", {"rank": 3}, None), ("oft", {"block_size": 4}, None), ("diablo", {"blocks": 2}, 16)],
)
def test_peft_opens_both_towers_and_gives_what_we_do(method, options, rank, folder, tmp_path):
    """What is no method of PEFT's, becomes factors."""
    model, found = adapted(folder, method, **options)
    ours = pooled(model.root, folder)
    done = export(found, tmp_path / "peft", "peft", dtype=torch.float32, model=model, rank=rank)
    assert not [note for note in done.notes if "not written" in note]
    stock = AutoModel.from_pretrained(folder)
    plain = pooled(stock, folder)
    theirs = PeftModel.from_pretrained(stock, str(tmp_path / "peft")).eval()
    torch.testing.assert_close(pooled(theirs.base_model.model, folder), ours, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-2


def test_a_folder_that_peft_trained_on_the_whole_model_is_read(folder, tmp_path):
    theirs = get_peft_model(AutoModel.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj", "fc2"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    theirs.save_pretrained(tmp_path / "peft")
    model = models.load(str(folder))
    found = read_foreign(tmp_path / "peft", model.networks(), model.family, "vision_model")
    assert {layer.partition(".")[0] for layer in found.layers} == {"vision_model", "text_model"}
    torch.testing.assert_close(pooled(model.root, folder), pooled(theirs.eval().base_model.model, folder))


def test_one_tower_alone_is_written_where_it_is_asked_for(folder, tmp_path):
    model, found = adapted(folder)
    done = export(found, tmp_path / "one", "peft", dtype=torch.float32, model=model, component="text_model")
    assert any("not written: vision_model" in note for note in done.notes)
    with pytest.raises(UserError, match="the adapter has no component 'unet'"):
        export(found, tmp_path / "none", "peft", dtype=torch.float32, model=model, component="unet")
