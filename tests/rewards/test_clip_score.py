"""CLIP score: the reference preprocessing and features of both libraries, and gradients to the pixels."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_rewards import smooth
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from visiontune import plugin
from visiontune.errors import UserError
from visiontune.models.clip import load_clip
from visiontune.ops.pixels import to_tensor


def _score(model: str | Path, **options: object):
    module, config = plugin.configure("rewards", {"name": "clip_score", "model": str(model), **options}, "reward")
    return module.build(config)


@pytest.mark.parametrize("size", [(32, 32), (60, 100), (97, 41)])
def test_transformers_score_equals_the_reference_path(clip_folder: Path, size: tuple[int, int]) -> None:
    picture, prompts = smooth(*size), ["a red circle"]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    pixels = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(prompts, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = CLIPModel.from_pretrained(clip_folder)(pixel_values=pixels, **tokens)
    expected = F.cosine_similarity(out.image_embeds, out.text_embeds)
    score = _score(clip_folder)(to_tensor(picture[None]), prompts)
    exact = size == (32, 32)
    torch.testing.assert_close(score, expected, atol=1e-5 if exact else 1e-2, rtol=0)


def _same_to_a_grey_level(got: torch.Tensor, expected: torch.Tensor, std: float) -> None:
    """The libraries round to bytes twice on the way."""
    torch.testing.assert_close(got, expected, atol=1.25 / 255 / std, rtol=0)


def _striped(height: int, width: int) -> np.ndarray:
    """Fine stripes turn into other stripes without antialiasing."""
    picture = smooth(height, width)
    picture[:, ::3] //= 2
    return picture


def _disc(height: int, width: int) -> np.ndarray:
    """Hard edges, at which bicubic filters overshoot."""
    y, x = np.ogrid[-1 : 1 : 1j * height, -1 : 1 : 1j * width]
    return np.where((x**2 + y**2 < 0.4)[..., None], 255, 0).astype(np.uint8).repeat(3, -1)


def _chequers(height: int, width: int) -> np.ndarray:
    y, x = np.ogrid[:height, :width]
    return ((y // 5 + x // 7) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)


# At 97x41 the rest of the crop is odd, and the libraries disagree on where to cut.
SIZES = [(32, 32), (60, 100), (97, 41), (301, 200)]
# Pillow 13 resizes what is higher than wide in another order than before, and than torchvision, which shows at edges.
PICTURES = [(_striped, size) for size in SIZES] + [
    (paint, size) for paint in (_disc, _chequers) for size in [(32, 32), (60, 100), (64, 64), (23, 31)]
]


@pytest.mark.parametrize(("paint", "size"), PICTURES)
def test_transformers_preprocessing_equals_the_reference(
    clip_folder: Path, paint: Callable[..., np.ndarray], size: tuple[int, int]
) -> None:
    picture = paint(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    expected = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    _same_to_a_grey_level(load_clip(str(clip_folder)).preprocess(to_tensor(picture[None])), expected, 0.26)


def test_scores_do_not_depend_on_the_batch_and_depend_on_the_prompt(clip_folder: Path) -> None:
    reward = _score(clip_folder)
    images = to_tensor(np.stack([smooth(40, 40), smooth(40, 40).transpose(1, 0, 2), 255 - smooth(40, 40)]))
    prompts = ["a", "a red circle with much to say", "blue"]
    together = reward(images, prompts)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert (reward(images, prompts[::-1]) - together).abs().max() > 1e-3


def test_gradient_reaches_the_pixels_and_nothing_else(clip_folder: Path) -> None:
    reward = _score(clip_folder)
    reward.encoder.model.double()
    reward.encoder.double()
    images = to_tensor(smooth(48, 40)[None]).double().requires_grad_()
    # The public call returns float32, too coarse for finite differences.
    grad = torch.autograd.grad(reward.score(images, ["red"], None).sum(), images)[0]
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        h = 1e-2
        ahead, behind = (reward.score(images + sign * h * direction, ["red"], None) for sign in (1, -1))
    torch.testing.assert_close((ahead - behind)[0] / (2 * h), (grad * direction).sum(), rtol=2e-2, atol=1e-6)
    assert not any(p.requires_grad for p in reward.encoder.parameters())
    assert reward.differentiable
    assert reward.range == (-1.0, 1.0)


def test_long_prompts_are_cut_with_a_warning(clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = load_clip(str(clip_folder))
    with caplog.at_level(logging.WARNING, "visiontune"):
        encoder.text_features(["short", "x" * 40])
    assert "1 of 2 prompts exceed CLIP's 16 tokens" in caplog.text


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    tower = {"layers": 2, "width": 16}
    vision = {**tower, "image_size": 32, "patch_size": 8, "head_width": 8}
    text = {**tower, "context_length": 16, "vocab_size": 514, "heads": 2, "hf_tokenizer_name": "here"}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "size": 32}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(1)
    model = open_clip.CLIP(**{k: v for k, v in config.items() if k != "text_cfg"},
                           text_cfg={k: v for k, v in text.items() if k != "hf_tokenizer_name"})  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.ndim else None
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(folder)
    # The tokenizer's files alone do not make it a transformers model folder.
    (folder / "config.json").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("size", [(32, 32), (50, 77)])
def test_open_clip_score_equals_the_reference_path(open_clip_folder: Path, size: tuple[int, int]) -> None:
    name = f"local-dir:{open_clip_folder}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    picture, prompts = smooth(*size), ["a red circle"]
    with torch.no_grad():
        image = model.eval().encode_image(preprocess(Image.fromarray(picture))[None], normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(name)(prompts), normalize=True)
    score = _score(open_clip_folder)(to_tensor(picture[None]), prompts)
    exact = size == (32, 32)
    torch.testing.assert_close(score, (image * text).sum(-1), atol=1e-5 if exact else 1e-2, rtol=0)


@pytest.mark.parametrize(("paint", "size"), PICTURES)
def test_open_clip_preprocessing_equals_the_reference(
    open_clip_folder: Path, paint: Callable[..., np.ndarray], size: tuple[int, int]
) -> None:
    picture = paint(*size)
    _, reference = open_clip.create_model_from_pretrained(f"local-dir:{open_clip_folder}")
    expected = reference(Image.fromarray(picture))[None]
    _same_to_a_grey_level(load_clip(str(open_clip_folder)).preprocess(to_tensor(picture[None])), expected, 0.2)


def test_missing_weights_are_a_user_error(
    tmp_path: Path, open_clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"CLIP '.*' cannot be loaded by transformers"):
        _score(tmp_path)
    with pytest.raises(UserError, match="there is no pocket model 'pocket/clib'; did you mean 'pocket/clip'"):
        _score("pocket/clib")
    with pytest.raises(UserError, match="<architecture>/<pretrained tag>"):
        _score("ViT-B-32", backend="open_clip")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "open_clip_config.json").write_text((open_clip_folder / "open_clip_config.json").read_text())
    with pytest.raises(UserError, match="cannot be loaded by open_clip"):
        _score(bare)


@pytest.mark.pocket
def test_both_formats_of_pocket_clip_agree() -> None:
    from visiontune.pocket.scenes import stream
    from visiontune.pocket.world import render

    pairs = [pair for pair, _ in zip(stream(77), range(8), strict=False)]
    images, prompts = np.stack([render(scene) for scene, _ in pairs]), [text for _, text in pairs]
    ours, theirs = load_clip("pocket/clip"), load_clip("pocket/clip", "open_clip")
    few = to_tensor(images)
    torch.testing.assert_close(ours.image_features(few), theirs.image_features(few), atol=5e-3, rtol=0)
    torch.testing.assert_close(ours.text_features(prompts), theirs.text_features(prompts), atol=5e-3, rtol=0)
