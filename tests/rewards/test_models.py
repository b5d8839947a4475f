"""Learned rewards equal what their authors compute: their preprocessing, their architecture, their file formats."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from tiny_rewards import (
    AESTHETIC,
    OPTIONS,
    clip_with_head,
    dino_folder,
    head_file,
    hpsv2_file,
    hpsv3_files,
    image_reward_file,
    image_reward_parts,
    smooth,
    tiny_open_clip,
    vlm_folder,
)
from torchvision import transforms
from transformers import AutoImageProcessor, AutoProcessor, CLIPModel, CLIPTokenizer, Dinov2Model

from visiontune.errors import UserError
from visiontune.models.clip import MEAN, STD
from visiontune.ops.pixels import to_tensor
from visiontune.rewards._vlm import chat
from visiontune.rewards.loading import load

SIZES = [(32, 32), (60, 100), (97, 41)]
GREY_LEVEL = 1 / 255


def _one(picture: np.ndarray) -> torch.Tensor:
    return to_tensor(picture[None])


# ------------------------------------------------------------------------------------------------ CLIP's relatives


def test_aesthetic_is_the_head_on_unit_features(tmp_path: Path) -> None:
    reward = load({"name": "aesthetic", **clip_with_head(tmp_path)})
    head, pixels = head_file(tmp_path / AESTHETIC, 16), _one(smooth(32, 32))
    with torch.no_grad():
        encoded = CLIPModel.from_pretrained(tmp_path).get_image_features(pixel_values=reward.encoder.preprocess(pixels))
        expected = head(F.normalize(encoded.pooler_output, dim=-1))[:, 0]
    torch.testing.assert_close(reward(pixels, ["not read"]), expected)


def test_the_aesthetic_range_is_reached_and_not_exceeded(tmp_path: Path) -> None:
    reward = load({"name": "aesthetic", **clip_with_head(tmp_path)})
    with torch.no_grad():
        slope = torch.func.jacrev(lambda f: reward.head(f))(torch.zeros(16))[0]
        ends = reward.head(torch.stack([-slope, slope]) / slope.norm()).flatten().tolist()
    assert reward.range == pytest.approx(ends, abs=1e-6)


def test_aesthetic_needs_its_head(tmp_path: Path) -> None:
    clip_with_head(tmp_path)
    (tmp_path / AESTHETIC).rename(tmp_path / "elsewhere.pth")
    with pytest.raises(UserError, match=r"download sac\+logos.*set head: FILE"):
        load({"name": "aesthetic", "model": str(tmp_path)})
    load({"name": "aesthetic", "model": str(tmp_path), "head": str(tmp_path / "elsewhere.pth")})
    head_file(tmp_path / "wide.pth", 17)
    with pytest.raises(UserError, match="reads 17 features; this CLIP has 16"):
        load({"name": "aesthetic", "model": str(tmp_path), "head": str(tmp_path / "wide.pth")})
    torch.save({"layers.0.weight": torch.zeros(1, 16)}, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"0\.bias is missing"):
        load({"name": "aesthetic", "model": str(tmp_path), "head": str(tmp_path / "half.pth")})
    torch.save(torch.load(tmp_path / "elsewhere.pth") | {"other.weight": torch.ones(8, 16)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"other\.weight is not part of the model"):
        load({"name": "aesthetic", "model": str(tmp_path), "head": str(tmp_path / "more.pth")})
    (tmp_path / "text.pth").write_text("<html>")
    with pytest.raises(UserError, match="read safely"):
        load({"name": "aesthetic", "model": str(tmp_path), "head": str(tmp_path / "text.pth")})


def test_pickscore_is_clips_own_logit(clip_folder: Path) -> None:
    pixels, prompts = _one(smooth(32, 32)), ["a red circle"]
    reward = load({"name": "pickscore", "model": str(clip_folder)})
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(prompts, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = CLIPModel.from_pretrained(clip_folder)(pixel_values=reward.encoder.preprocess(pixels), **tokens)
    torch.testing.assert_close(reward(pixels, prompts), out.logits_per_image[0])
    cosine = load({"name": "pickscore", "model": str(clip_folder), "cosine": True})
    torch.testing.assert_close(cosine(pixels, prompts) * reward.scale, out.logits_per_image[0])
    assert cosine.range == (-1, 1)


def test_pickscore_borrows_a_tokenizer_where_the_model_has_none(clip_folder: Path, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    lone = load({"name": "pickscore", "model": str(tmp_path), "tokenizer": str(clip_folder)})
    full = load({"name": "pickscore", "model": str(clip_folder)})
    pixels = _one(smooth(40, 50))
    assert torch.equal(lone(pixels, ["blue"]), full(pixels, ["blue"]))


@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_pads_as_its_authors_do(tmp_path: Path, size: tuple[int, int]) -> None:
    reward = load({"name": "hpsv2", **hpsv2_file(tmp_path)})
    picture = Image.fromarray(smooth(*size))
    scale = 32 / max(size)
    height, width = (round(side * scale) for side in size)
    canvas = Image.new("RGB", (32, 32))
    canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC), ((32 - width) // 2, (32 - height) // 2))
    pixels = transforms.Normalize(MEAN, STD)(transforms.functional.to_tensor(canvas))[None]
    torch.testing.assert_close(
        reward.encoder.preprocess(_one(smooth(*size))), pixels, atol=3 * GREY_LEVEL / min(STD), rtol=0
    )
    name, model = tiny_open_clip(tmp_path)
    with torch.no_grad():
        image, text, _ = model(pixels, open_clip.get_tokenizer(name)(["a red circle"]))
    torch.testing.assert_close(reward(_one(smooth(*size)), ["a red circle"]), (image * text).sum(-1), atol=1e-2, rtol=0)


def test_hpsv2_refuses_another_models_weights(tmp_path: Path) -> None:
    options = hpsv2_file(tmp_path)
    with pytest.raises(UserError, match=r"there is no HPS_v2_compressed\.pt"):
        load({"name": "hpsv2", **options, "version": "2.0"})
    torch.save({"state_dict": {"visual.proj": torch.zeros(2)}}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match=r"does not hold these weights: .* is missing"):
        load({"name": "hpsv2", **options})


# ----------------------------------------------------------------------------------------------------- ImageReward


def test_image_reward_is_what_its_authors_architecture_gives(tmp_path: Path) -> None:
    """The reference runs timm's ViT, which BLIP's is, and BERT with cross-attention under the checkpoint's names."""
    reward = load({"name": "image_reward", **image_reward_file(tmp_path)})
    vision, text = image_reward_parts()
    head = head_file(tmp_path / "again.pt", 128)
    prompts = ["a red circle", "ab"]
    images = to_tensor(np.stack([smooth(40, 52), smooth(40, 52, 1)]))
    tokens = reward.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    # An additive mask of four dimensions keeps BERT from looking at the past alone, as a decoder would.
    mask = (1.0 - tokens["attention_mask"][:, None, None, :].float()).expand(-1, 1, 35, -1) * -1e9
    with torch.no_grad():
        seen = vision.forward_features(reward.model["preprocess"](images))
        out = text(input_ids=tokens["input_ids"], attention_mask=mask, encoder_hidden_states=seen)
        expected = (head(out.last_hidden_state[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
    assert (expected[0] - expected[1]).abs() > 1e-3
    torch.testing.assert_close(reward(images, prompts), expected, atol=1e-5, rtol=1e-4)


def test_image_reward_reads_the_image_as_its_authors_do(tmp_path: Path) -> None:
    reward = load({"name": "image_reward", **image_reward_file(tmp_path)})
    theirs = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    for size in SIZES:
        expected = theirs(Image.fromarray(smooth(*size)))[None]
        got = reward.model["preprocess"](_one(smooth(*size)))
        torch.testing.assert_close(got, expected, atol=3 * GREY_LEVEL / min(STD), rtol=0)


def test_image_reward_cuts_long_prompts_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = load({"name": "image_reward", **image_reward_file(tmp_path)})
    with caplog.at_level(logging.WARNING, "visiontune"):
        reward(_one(smooth(32, 32)), ["word " * 30])
    assert "1 of 1 prompts exceed ImageReward's 35 tokens" in caplog.text


def test_image_reward_refuses_other_files(tmp_path: Path) -> None:
    image_reward_file(tmp_path)
    tensors = torch.load(tmp_path / "ImageReward.pt")
    for key in ("blip.visual_encoder.norm.bias", "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"):
        torch.save({k: v for k, v in tensors.items() if k != key}, tmp_path / "ImageReward.pt")
        with pytest.raises(UserError, match="is missing"):
            load({"name": "image_reward", "model": str(tmp_path)})
    torch.save({"a": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match="is not ImageReward's checkpoint"):
        load({"name": "image_reward", "model": str(tmp_path)})


# ------------------------------------------------------------------------------------------------------------ DINO


@pytest.mark.parametrize("size", [(32, 32), (60, 100), (97, 41), (301, 200)])
def test_dino_preprocessing_is_the_processors(tmp_path: Path, size: tuple[int, int]) -> None:
    reward = load({"name": "dino", **dino_folder(tmp_path)})
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor(Image.fromarray(smooth(*size)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(reward.preprocess(_one(smooth(*size))), expected, atol=3 * GREY_LEVEL / 0.224, rtol=0)


def test_dino_is_the_mean_cosine_with_the_references(tmp_path: Path) -> None:
    options = dino_folder(tmp_path)
    model, pixels = Dinov2Model.from_pretrained(tmp_path).eval(), _one(smooth(45, 40, 2))
    mean = load({"name": "dino", **options})
    best = load({"name": "dino", **options, "over": "max"})
    images = [pixels, *(_one(np.array(Image.open(f))) for f in sorted((tmp_path / "references").iterdir()))]
    with torch.no_grad():
        features = torch.cat([model(pixel_values=mean.preprocess(image)).pooler_output for image in images])
    cosines = F.cosine_similarity(features[:1], features[1:])
    torch.testing.assert_close(mean(pixels, [""])[0], cosines.mean())
    torch.testing.assert_close(best(pixels, [""])[0], cosines.max())
    assert best(images[1], [""]).item() == pytest.approx(1, abs=1e-5)


def test_dino_takes_a_vit_that_squashes(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**tower, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, resample=2).save_pretrained(tmp_path)
    Image.fromarray(smooth(50, 40)).save(tmp_path / "subject.png")
    reward = load({"name": "dino", "model": str(tmp_path), "references": str(tmp_path / "subject.png")})
    expected = AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(smooth(50, 40)), return_tensors="pt")
    got = reward.preprocess(_one(smooth(50, 40)))
    torch.testing.assert_close(got, expected["pixel_values"], atol=3 * GREY_LEVEL / 0.5, rtol=0)
    assert reward(_one(smooth(50, 40)), [""]).item() == pytest.approx(1, abs=1e-5)


def test_dino_reads_its_references_as_training_reads_pictures(tmp_path: Path) -> None:
    options = dino_folder(tmp_path)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 3
    for name in ("plain", "turned"):
        (tmp_path / name).mkdir()
    Image.fromarray(smooth(40, 40)).save(tmp_path / "turned" / "a.png", exif=turned)
    (tmp_path / "turned" / "._a.png").write_bytes(b"of a file system")
    Image.fromarray(smooth(40, 40)).rotate(180).save(tmp_path / "plain" / "a.png")
    plain, turn = (
        load({"name": "dino", **options, "references": str(tmp_path / name)}).references for name in ("plain", "turned")
    )
    torch.testing.assert_close(turn, plain)


def test_dino_needs_references(tmp_path: Path) -> None:
    options = dino_folder(tmp_path)
    with pytest.raises(UserError, match="set references: FOLDER"):
        load({"name": "dino", "model": options["model"]})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no reference images"):
        load({"name": "dino", "model": options["model"], "references": str(tmp_path / "empty")})
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png is not a readable image"):
        load({"name": "dino", "model": options["model"], "references": str(tmp_path / "empty")})


# -------------------------------------------------------------------------------------------------------- VQAScore


@pytest.mark.parametrize("size", [(32, 32), (60, 100), (97, 41)])
def test_vqa_score_is_the_probability_of_yes(tmp_path: Path, size: tuple[int, int]) -> None:
    reward = load({"name": "vqa_score", **vlm_folder(tmp_path)})
    processor = AutoProcessor.from_pretrained(tmp_path)
    text = 'USER: <image>\nDoes this figure show "a cat"? Please answer yes or no. ASSISTANT:'
    inputs = processor(text=[text], images=[Image.fromarray(smooth(*size))], return_tensors="pt")
    with torch.no_grad():
        probabilities = reward.model(**inputs).logits[0, -1].softmax(-1)
    tokens = {processor.tokenizer.encode(word)[0] for word in ("Yes", "yes")}
    expected = sum(probabilities[token] for token in tokens)
    got = reward(_one(smooth(*size)), ["a cat"])[0]
    torch.testing.assert_close(got, expected, atol=1e-6 if size == (32, 32) else 5e-3, rtol=0)
    assert got > 1e-4


def test_vqa_score_reads_prompt_and_image(tmp_path: Path) -> None:
    reward = load({"name": "vqa_score", **vlm_folder(tmp_path)})
    images = to_tensor(np.stack([smooth(32, 32), 255 - smooth(32, 32)]))
    assert reward(images, ["a cat", "a cat"]).diff().abs() > 1e-5
    assert (reward(images, ["a {dog}", "a cat"]) - reward(images, ["a cat", "a cat"]))[0].abs() > 1e-5


def test_vqa_score_without_a_chat_template_still_shows_the_image(tmp_path: Path) -> None:
    reward = load({"name": "vqa_score", **vlm_folder(tmp_path), "question": "Q: {prompt}?"})
    reward.processor.chat_template = None
    assert chat(reward.processor, "Q: a cat?") == "<image>\nQ: a cat?"
    assert 0 <= reward(_one(smooth(32, 32)), ["a cat"]).item() <= 1


def test_vqa_score_says_when_a_processor_passes_no_gradient(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil

    reward = load({"name": "vqa_score", **vlm_folder(tmp_path)})
    reward.processor.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    expected = load({"name": "vqa_score", "model": str(tmp_path)})(_one(smooth(32, 32)), ["a cat"])
    torch.testing.assert_close(reward(_one(smooth(32, 32)), ["a cat"]), expected)
    with pytest.raises(UserError, match="passes no gradient"):
        reward(_one(smooth(32, 32)).requires_grad_(), ["a cat"])


def test_vqa_score_options_are_checked() -> None:
    with pytest.raises(UserError, match=r"must contain \{prompt\}"):
        load({"name": "vqa_score", "question": "a cat?"})


# ---------------------------------------------------------------------------------------------------------- HPS v3


@pytest.mark.parametrize("size", [(448, 448), (60, 100)])
def test_hpsv3_is_the_head_on_the_state_of_its_token(tmp_path: Path, size: tuple[int, int]) -> None:
    reward = load({"name": "hpsv3", **hpsv3_files(tmp_path)})
    processor, model = AutoProcessor.from_pretrained(tmp_path / "base"), reward.model
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    text = "<|vision_start|><|image_pad|><|vision_end|>Rate the image of a cat. Rating: <|Reward|> A:"
    edge = {"shortest_edge": 448 * 448, "longest_edge": 448 * 448}
    inputs = processor(text=[text], images=[Image.fromarray(smooth(*size))], size=edge, return_tensors="pt")
    with torch.no_grad():
        words = model.language_model.embed_tokens(inputs["input_ids"])
        seen = torch.cat(model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output)
        words[inputs["input_ids"] == model.config.image_token_id] = seen
        # Without positions the tongue counts its tokens on in a row.
        states = model.language_model(inputs_embeds=words).last_hidden_state[0]
        of_token = states[inputs["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids("<|Reward|>")]
        expected = reward.head(of_token)[0, 0]
    assert 0.7 * 256 <= len(seen) <= 1.3 * 256
    got = reward(_one(smooth(*size)), ["a cat"])[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 if size == (448, 448) else 2e-3)


def test_hpsv3_reads_prompt_and_image(tmp_path: Path) -> None:
    reward = load({"name": "hpsv3", **hpsv3_files(tmp_path)})
    images = to_tensor(np.stack([smooth(32, 32), 255 - smooth(32, 32)]))
    scores = reward(images, ["a cat", "a cat"])
    assert scores.diff().abs() > 1e-4
    assert (reward(images, ["a {dog}", "a cat"]) - scores)[0].abs() > 1e-4
    assert reward(images[1:], ["a cat"])[0] == scores[1]


def test_hpsv3_finds_the_instruction_in_its_authors_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = hpsv3_files(tmp_path)
    expected = load({"name": "hpsv3", **options})(_one(smooth(32, 32)), ["a cat"])
    without = {key: value for key, value in options.items() if key != "instruction"}
    monkeypatch.syspath_prepend(tmp_path / "site")
    if importlib.util.find_spec("hpsv3") is None:
        with pytest.raises(UserError, match="pip install --no-deps hpsv3"):
            load({"name": "hpsv3", **without})
    source = tmp_path / "site" / "hpsv3" / "dataset" / "data_collator_qwen.py"
    source.parent.mkdir(parents=True)
    (tmp_path / "site" / "hpsv3" / "__init__.py").write_text("raise ImportError")
    source.write_text("import nothing_of_that_name\nINSTRUCTION = 'Rate the image of {text_prompt}. '\n")
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="no 'prompt_with_special_token'"):
        load({"name": "hpsv3", **without})
    with source.open("a") as file:
        file.write("prompt_with_special_token = 'Rating: <|Reward|>'\n")
    assert torch.equal(load({"name": "hpsv3", **without})(_one(smooth(32, 32)), ["a cat"]), expected)


def test_hpsv3_refuses_what_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = {"name": "hpsv3", **hpsv3_files(tmp_path)}
    (tmp_path / "bare.txt").write_text("Rate the image of {text_prompt}.")
    with pytest.raises(UserError, match=r"must contain \{text_prompt\} and <\|Reward\|>"):
        load({**options, "instruction": str(tmp_path / "bare.txt")})
    with pytest.raises(UserError, match="correct instruction"):
        load({**options, "instruction": str(tmp_path / "none.txt")})
    with pytest.raises(UserError, match=r"hf download nobody/here --local-dir FOLDER` and set base: FOLDER"):
        load({**options, "base": "nobody/here"})
    tensors = load_file(tmp_path / "HPSv3.safetensors")
    for missing in ("model.embed_tokens.weight", "visual.blocks.1.norm1.bias", "rm_head.3.weight"):
        save_file({k: v for k, v in tensors.items() if k != missing}, tmp_path / "HPSv3.safetensors")
        with pytest.raises(UserError, match="is missing"):
            load(options)


# ------------------------------------------------------------------------------------------------------ everywhere


@pytest.mark.parametrize("name", ["aesthetic", "dino", "hpsv2", "hpsv3", "image_reward", "pickscore", "vqa_score"])
def test_a_models_parameters_are_frozen_and_in_evaluation_mode(name: str, tmp_path: Path) -> None:
    reward = load({"name": name, **OPTIONS[name](tmp_path)})
    parts = [v for v in vars(reward).values() if isinstance(v, torch.nn.Module)]
    assert parts
    for part in parts:
        assert not any(p.requires_grad for p in part.parameters())
        assert not any(m.training for m in part.modules() if list(m.parameters(recurse=False)))
