"""SigLIP as transformers has it: padding that is read, squashed pictures, features of patches and words, its loss."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_rewards import tiny_clip_folder, tiny_siglip_folder
from transformers import AutoTokenizer, SiglipImageProcessor, SiglipModel

from visiontune import models
from visiontune.core import Batch
from visiontune.errors import UserError
from visiontune.objectives import siglip
from visiontune.objectives.base import Tools
from visiontune.ops.pixels import to_tensor

CAPTIONS = ["red dog", "a green cat", "a green cat", "two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_siglip_folder(tmp_path_factory.mktemp("siglip") / "siglip", 16)


def pictures(count=1, height=24, width=16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, height, width, 3), dtype=np.uint8)


def batch(captions) -> Batch:
    rows = len(captions)
    none = torch.zeros(rows, dtype=torch.bool)
    shown = to_tensor(pictures(rows, 16, 16))
    ids = [str(i) for i in range(rows)]
    return Batch(prompts=[*captions], data={"image": shown}, cond=None, weight=torch.ones(rows), prior=none, ids=ids)


def theirs(folder):
    return SiglipModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("resample", [2, 3])
def test_pictures_are_squashed_as_the_processor_does(resample, folder, tmp_path):
    own = tmp_path / "own"
    models.load(str(folder)).save(own)
    settings = json.loads((own / "preprocessor_config.json").read_text()) | {"resample": resample}
    (own / "preprocessor_config.json").write_text(json.dumps(settings))
    stock, _ = theirs(own)
    shown = SiglipImageProcessor.from_pretrained(own)(Image.fromarray(pictures()[0]), return_tensors="pt")
    found = models.load(str(own)).image_features(to_tensor(pictures())).pooled
    expected = stock.get_image_features(**shown).pooler_output
    # The processor rounds what it has resized to bytes.
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.05)
    assert torch.cosine_similarity(found, expected) > 0.9999


def test_texts_are_padded_to_the_full_length_and_no_padding_is_hidden(folder):
    stock, tokenizer = theirs(folder)
    found = models.load(str(folder)).text_features(CAPTIONS)
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    expected = stock.get_text_features(input_ids=ids)
    torch.testing.assert_close(found.pooled, expected.pooler_output)
    torch.testing.assert_close(found.dense[:, -1], found.pooled)
    assert torch.equal(found.mask, ids != tokenizer.pad_token_id)
    short = stock.get_text_features(input_ids=ids[:, :8]).pooler_output
    assert not torch.allclose(short, found.pooled, atol=1e-2)


def test_a_picture_of_one_patch_is_its_patch(tmp_path):
    model = models.load(str(tiny_siglip_folder(tmp_path / "one", 8)))
    found = model.image_features(to_tensor(pictures(2, 8, 8)))
    assert found.dense.shape == (2, 1, 16)
    torch.testing.assert_close(found.dense[:, 0], found.pooled)


def test_the_loss_is_that_of_transformers_where_captions_differ(folder):
    stock, tokenizer = theirs(folder)
    captions = ["red dog", "a green cat", "two"]
    rows, model = batch(captions), models.load(str(folder))
    ids = tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt").input_ids
    expected = stock(input_ids=ids, pixel_values=2 * rows.data["image"] - 1, return_loss=True).loss
    for equal in ("ignore", "positive", "negative"):
        torch.testing.assert_close(siglip.build(siglip.Config(equal=equal)).loss(model, rows, Tools()).total, expected)


def test_equal_captions_are_not_asked_or_yes_or_no(folder):
    model, rows = models.load(str(folder)), batch(CAPTIONS)
    found = {
        equal: float(siglip.build(siglip.Config(equal=equal)).loss(model, rows, Tools()).total)
        for equal in ("ignore", "positive", "negative")
    }
    shown, told = (
        torch.nn.functional.normalize(one.pooled, dim=-1)
        for one in (model.image_features(rows.data["image"]), model.text_features(CAPTIONS))
    )
    logits = model.logit_scale * shown @ told.T + model.logit_bias
    doubtful = logits[[1, 2], [2, 1]]
    yes, no = (-torch.nn.functional.logsigmoid(sign * doubtful).sum() / 4 for sign in (1, -1))
    assert found["positive"] == pytest.approx(found["ignore"] + float(yes), rel=1e-5)
    assert found["negative"] == pytest.approx(found["ignore"] + float(no), rel=1e-5)


def test_what_was_saved_is_opened_again(folder, tmp_path):
    model = models.load(str(folder))
    model.save(tmp_path / "again")
    again = models.load(str(tmp_path / "again"))
    assert again.family == "siglip" and again.roles() == model.roles()
    shown = to_tensor(pictures())
    torch.testing.assert_close(again.image_features(shown).pooled, model.image_features(shown).pooled)
    torch.testing.assert_close(again.text_features(CAPTIONS).pooled, model.text_features(CAPTIONS).pooled)


def test_a_model_without_a_bias_is_refused(tmp_path):
    model = models.load(str(tiny_clip_folder(tmp_path / "clip", 16)))
    with pytest.raises(UserError, match=r"bias of their logits, and .* \(clip\) has none: take contrastive"):
        siglip.build(siglip.Config()).check(model, None)
