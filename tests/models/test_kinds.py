"""Models of transformers and open_clip as sets of networks: every parameter in one, opened, saved and computed with."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import save_tiny_llava
from tiny_rewards import smooth, tiny_clip_folder
from transformers import AutoTokenizer, CLIPModel, LlavaForConditionalGeneration

from visiontune import adapters, models
from visiontune.errors import UserError
from visiontune.models import pocket
from visiontune.ops.pixels import to_tensor
from visiontune.rewards import clip_score
from visiontune.training.config import TrainConfig
from visiontune.training.optim import rates
from visiontune.weights.export import export

TEXTS = ["<image> a red circle", "<image> a blue square in the photo"]
PROMPTS = ["a red circle", "blue"]


def pictures(count: int = 2, side: int = 16) -> list[Image.Image]:
    return [Image.fromarray(smooth(side, side, seed)) for seed in range(count)]


def images(side: int = 40) -> torch.Tensor:
    return to_tensor(np.stack([smooth(side, side + 8, seed) for seed in range(2)]))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny model of each format, by name."""
    root = tmp_path_factory.mktemp("kinds")
    tiny_clip_folder(root / "clip")
    save_tiny_llava(root / "llava", vision_feature_layer=-1)
    save_tiny_llava(root / "tied", vision_feature_layer=-1, tie_word_embeddings=True)
    own = ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer*", "vocab.json", "merges.txt")
    (root / "open_clip").mkdir()
    for pattern in own:
        for file in pocket.folder("pocket/clip", "config.json").glob(pattern):
            shutil.copy(file, root / "open_clip")
    return {name: str(root / name) for name in ("clip", "llava", "tied", "open_clip")} | {"pocket": "pocket/clip"}


NAMES = ["clip", "llava", "tied", "open_clip", "pocket"]
each = pytest.mark.parametrize("name", NAMES)


def whole(model) -> torch.nn.Module:
    return model.module if hasattr(model, "module") else model.encoder.model


def seen(model) -> torch.Tensor:
    """What a model says of some pictures and texts."""
    if hasattr(model, "module"):
        return model.logits(**model.encode(TEXTS, pictures()))
    found = [model.image_features(images()), model.text_features(PROMPTS)]
    return torch.cat([part for features in found for part in (features.pooled, features.dense.mean(1))])


@each
def test_every_parameter_belongs_to_one_network_and_every_network_to_one_role(name, folders):
    model = models.load(folders[name])
    held = [id(p) for network in model.networks().values() for p in network.parameters()]
    assert len(held) == len({*held}) and {*held} == {id(p) for p in whole(model).parameters()}
    assert sorted(part for parts in model.roles().values() for part in parts) == sorted(model.networks())
    assert all(model.roles().values()) or name == "tied"
    assert not any(p.requires_grad for p in whole(model).parameters()) and not whole(model).training


@each
def test_networks_are_called_as_their_saved_keys_begin(name, folders, tmp_path):
    model = models.load(folders[name])
    model.save(tmp_path / "saved")
    with safe_open(next((tmp_path / "saved").glob("*model.safetensors")), "pt") as file:
        keys = {key.removeprefix("model.").partition(".")[0] for key in file.keys()}  # noqa: SIM118
    # Files of LLaVA keep the head within the language model.
    assert keys | ({"lm_head"} if name == "llava" else set()) == {*model.networks()}


@each
def test_a_saved_model_opens_again_and_computes_the_same(name, folders, tmp_path):
    model = models.load(folders[name])
    with torch.no_grad():
        next(model.main.parameters()).add_(0.5)
    model.save(tmp_path / "saved")
    again = models.load(str(tmp_path / "saved"))
    assert again.fingerprint(*again.networks()) == model.fingerprint(*model.networks())
    assert torch.equal(seen(again), seen(model))
    other = models.load(folders[name])
    assert other.fingerprint(*other.names()) != again.fingerprint(*again.names())
    assert not torch.equal(seen(other), seen(again))


@each
def test_bfloat16_is_near_and_gives_its_weights_back_whole(name, folders):
    model = models.load(folders[name])
    exact, rough = seen(model), seen(model.at(torch.bfloat16)).float()
    assert 0 < (rough - exact).norm() < 0.05 * exact.norm()
    assert seen(models.load(folders[name], dtype=torch.bfloat16)).isfinite().all()


@each
def test_parts_move_and_come_back(name, folders):
    model = models.load(folders[name])
    assert model.release("vision") is model and model.to("cpu") is model and model.device.type == "cpu"
    assert torch.equal(seen(model), seen(models.load(folders[name])))


@each
@pytest.mark.parametrize("preset", ["attention", "attention+ff", "all"])
def test_presets_reach_every_tower(name, folders, preset):
    model = models.load(folders[name])
    towers = [role for role in model.TARGETS if model.roles()[role]]
    trained = model.names(towers)
    found = adapters.attach(model.of(*trained), "lora", targets=preset, presets=model.presets(trained), rank=1)
    layers = {part: [layer for layer in found.layers if layer.startswith(f"{part}.")] for part in trained}
    blocks = 4 if name in ("open_clip", "pocket") else 2
    count = {"attention": 2 if name == "open_clip" else 4, "attention+ff": 4 if name == "open_clip" else 6}
    for part in trained:
        if part != "multi_modal_projector" and preset in count:
            extra = part == "language_model" and preset == "attention+ff"  # a gate besides
            assert len(layers[part]) == blocks * (count[preset] + extra), (part, layers[part])
        assert layers[part]
    before = seen(model)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1)
    assert not torch.equal(seen(model), before)


# -------------------------------------------------------------------------------------------------------- contrastive


@pytest.mark.parametrize("name", ["clip", "open_clip", "pocket"])
def test_features_are_those_that_rewards_compare(name, folders):
    from visiontune.models.clip import load_clip

    model, encoder = models.load(folders[name]), load_clip(folders[name])
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(model.image_features(images()).pooled, dim=-1), encoder.image_features(images()))
    torch.testing.assert_close(unit(model.text_features(PROMPTS).pooled, dim=-1), encoder.text_features(PROMPTS))


def test_logits_are_those_of_transformers(folders):
    model, stock = models.load(folders["clip"]), CLIPModel.from_pretrained(folders["clip"])
    tokens = AutoTokenizer.from_pretrained(folders["clip"])(PROMPTS, padding=True, return_tensors="pt")
    expected = stock(pixel_values=model.encoder.preprocess(images()), **tokens).logits_per_image
    unit = torch.nn.functional.normalize
    shown, told = unit(model.image_features(images()).pooled), unit(model.text_features(PROMPTS).pooled)
    torch.testing.assert_close(model.logit_scale * shown @ told.T, expected)


@pytest.mark.parametrize("name", ["clip", "open_clip", "pocket"])
def test_what_pools_a_text_is_one_of_its_tokens(name, folders):
    model = models.load(folders[name])
    found = model.text_features(PROMPTS)
    away = (found.dense - found.pooled[:, None]).abs().amax(-1)
    assert (away.amin(1) < 1e-5).all() and (away.amax(1) > 0.1).all()


def test_both_formats_of_pocket_clip_see_the_same(folders):
    one, other = models.load("pocket/clip"), models.load(folders["open_clip"])
    for ours, theirs in ((one.image_features(images()), other.image_features(images())),):
        torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.dense, theirs.dense, rtol=1e-4, atol=1e-4)
    ours, theirs = one.text_features(PROMPTS[:1]), other.text_features(PROMPTS[:1])
    torch.testing.assert_close(ours.dense, theirs.dense[:, : ours.dense.shape[1]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.logit_scale, other.logit_scale)


def test_patches_lie_row_by_row(folders):
    """A change in the lower right corner changes the last patch the most."""
    model, changed = models.load("pocket/clip"), images(64)[:, :, :, :64]
    before = model.image_features(changed.clone()).dense
    changed[:, :, -8:, -8:] = 1 - changed[:, :, -8:, -8:]
    moved = (model.image_features(changed).dense - before).norm(dim=-1)
    assert moved.shape == (2, 64) and (moved.argmax(1) == 63).all()


def test_a_saved_clip_is_a_reward(folders, tmp_path):
    models.load(folders["pocket"]).save(tmp_path / "saved")
    ours, theirs = (clip_score.build(clip_score.Config(model=m)) for m in (str(tmp_path / "saved"), "pocket/clip"))
    torch.testing.assert_close(ours(images(), PROMPTS), theirs(images(), PROMPTS))


# ----------------------------------------------------------------------------------------------------------- language


def test_logits_are_those_of_the_stock_class(folders):
    model, stock = models.load(folders["llava"]), LlavaForConditionalGeneration.from_pretrained(folders["llava"])
    inputs = model.encode(TEXTS, pictures())
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert torch.equal(model.logits(**inputs), stock(**inputs).logits)
    assert not torch.equal(model.logits(**model.encode(TEXTS, pictures()[::-1])), model.logits(**inputs))


# ------------------------------------------------------------------------------------------------------------ opening


def test_other_architectures_are_refused_with_those_that_work(folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(UserError, match="has the architecture BertModel; supported: CLIPModel, LlavaForCond") as caught:
        models.load(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has the architecture None"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("name", ["clip", "llava", "open_clip"])
def test_truncated_weights_are_refused_in_one_line(name, folders, tmp_path):
    shutil.copytree(folders[name], tmp_path / "broken")
    weights = next((tmp_path / "broken").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot be read .* give a complete") as caught:
        models.load(str(tmp_path / "broken"))
    assert "\n" not in str(caught.value)


def test_a_network_without_a_role_has_its_own_rate(folders):
    model = models.load(folders["clip"])
    model.roles = lambda: {"vision": ("vision_model",)}
    train = TrainConfig(parts=["vision", "logit_scale"], part_lr={"logit_scale": 1e-2})
    assert rates(model, train)["logit_scale"] == ("logit_scale", 1e-2)


@pytest.mark.parametrize("name", ["clip", "llava", "open_clip"])
def test_an_adapter_is_exported_into_a_whole_model_and_loads_again(name, folders, tmp_path):
    model = models.load(folders[name])
    towers = model.names([role for role in model.TARGETS])
    found = adapters.attach(model.of(*towers), "lora", targets="attention", presets=model.presets(towers), rank=1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1)
    found.save(tmp_path / "adapter.safetensors")
    expected = seen(model)
    export(found, tmp_path / "merged", "merged", dtype=torch.float32, model=model)
    torch.testing.assert_close(seen(models.load(str(tmp_path / "merged"))), expected, rtol=1e-4, atol=1e-4)
    other = models.load(folders[name])
    adapters.load(other.networks(), tmp_path / "adapter.safetensors")
    torch.testing.assert_close(seen(other), expected)
