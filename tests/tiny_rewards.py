"""Tiny random models of the real architectures, in the files that the rewards load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer, SiglipConfig, SiglipModel

AESTHETIC = "sac+logos+ava1-l14-linearMSE.pth"


def spread(model: nn.Module, std: float = 0.3) -> None:
    """Freshly initialised towers hardly react to their input."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std) if parameter.ndim else None


def tiny_clip_folder(folder: Path, image_size: int = 32) -> Path:
    """A CLIPModel of two narrow layers with a byte-level tokenizer of 16 positions."""
    torch.manual_seed(0)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=16)
    end = len(tokens) - 1
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokens), "max_position_embeddings": 16}
    text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    vision = {**tower, "image_size": image_size, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_siglip_folder(folder: Path, image_size: int = 32) -> Path:
    """A SiglipModel of two narrow layers with the tokenizer of the tiny CLIP, which pads with its end."""
    words = AutoTokenizer.from_pretrained(tiny_clip_folder(folder, image_size))
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": 16, "projection_size": 16}
    text |= {"pad_token_id": words.pad_token_id, "bos_token_id": None, "eos_token_id": words.eos_token_id}
    model = SiglipModel(
        SiglipConfig(text_config=text, vision_config={**tower, "image_size": image_size, "patch_size": 8})
    )
    spread(model)
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
        model.logit_bias.fill_(-2.0)
    model.save_pretrained(folder)
    return folder


# Of each family of two towers, what writes a tiny model into a folder.
TOWERS = {"clip": tiny_clip_folder, "siglip": tiny_siglip_folder}


def head_file(path: Path, width: int, prefix: str = "") -> nn.Sequential:
    """A score head in the form of the public releases: linear layers 0, 2, 4, 6 and 7 with dropouts between."""
    torch.manual_seed(2)
    sizes, drop = [width, 8, 6, 4, 4, 1], [True, True, True, False, False]
    layers: list[nn.Module] = []
    for i, dropped in enumerate(drop):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), *([nn.Dropout(0.2)] if dropped else [])]
    head = nn.Sequential(*layers).eval()
    spread(head, 0.6)
    torch.save({f"{prefix}layers.{key}": value for key, value in head.state_dict().items()}, path)
    return head


def tiny_open_clip(folder: Path) -> tuple[str, Any]:
    """An open_clip architecture of two narrow layers with open_clip's own tokenizer, known by the returned name."""
    tower = {"layers": 2, "width": 16}
    vision = {**tower, "image_size": 32, "patch_size": 8, "head_width": 8}
    text = {**tower, "context_length": 77, "vocab_size": 49408, "heads": 2}
    (folder / "tiny-clip.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(1)
    model = open_clip.create_model("tiny-clip", pretrained=None)
    spread(model)
    return "tiny-clip", model.eval()


def hpsv2_file(folder: Path) -> dict[str, Any]:
    name, model = tiny_open_clip(folder)
    file = folder / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, file)
    return {"model": str(folder), "architecture": name}


def bert_tokenizer(folder: Path) -> None:
    from transformers import BertTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), "."]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True).save_pretrained(folder)


def image_reward_parts() -> tuple[nn.Module, nn.Module]:
    """BLIP's two encoders as their authors wrote them: timm's ViT, and BERT with cross-attention."""
    import timm
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    vision = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, mlp_ratio=2, num_classes=0, global_pool=""
    )
    config = BertConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, is_decoder=True, add_cross_attention=True, attn_implementation="eager",
    )  # fmt: skip
    text = BertModel(config, add_pooling_layer=False)
    for part in (vision, text):
        spread(part, 0.1)
    # BLIP's BERT has no token types.
    nn.init.zeros_(text.embeddings.token_type_embeddings.weight)
    return vision.eval(), text.eval()


def image_reward_file(folder: Path) -> dict[str, Any]:
    vision, text = image_reward_parts()
    head_file(folder / "head.pt", 128, "mlp.")
    tensors = {f"blip.visual_encoder.{key}": value for key, value in vision.state_dict().items()}
    tensors |= {f"blip.text_encoder.{k}": v for k, v in text.state_dict().items() if "token_type" not in k}
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    tensors["blip.itm_head.weight"] = torch.zeros(2, 128)
    torch.save(tensors | torch.load(folder / "head.pt"), folder / "ImageReward.pt")
    bert_tokenizer(folder)
    return {"model": str(folder)}


def dino_folder(folder: Path) -> dict[str, Any]:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(4)
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(**tower, image_size=28, patch_size=7))
    spread(model)
    model.save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip
    references = folder / "references"
    references.mkdir(exist_ok=True)
    for i, (height, width) in enumerate([(40, 60), (33, 29)]):
        Image.fromarray(smooth(height, width, i)).save(references / f"{i}.png")
    return {"model": str(folder), "references": str(references)}


def vlm_folder(folder: Path) -> dict[str, Any]:
    """A LLaVA of two narrow layers: CLIP's eye, Llama's tongue, a tokenizer of bytes."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(5)
    tokenizer = _byte_tokenizer("<image>")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **tower, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **tower, "num_key_value_heads": 2, "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    spread(model, 0.4)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:",
    ).save_pretrained(folder)  # fmt: skip
    return {"model": str(folder)}


def _byte_tokenizer(*special: str) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    words.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": list(special)})
    return tokenizer


def hpsv3_files(folder: Path) -> dict[str, Any]:
    """A Qwen2-VL of two narrow layers, as a folder without weights and as a checkpoint with transformers 4's names."""
    from safetensors.torch import save_file
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    torch.manual_seed(6)
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _byte_tokenizer(*marks)
    start, end, image, video = tokenizer.convert_tokens_to_ids(marks)
    settings = Qwen2VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": len(tokenizer) + 20,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    settings.save_pretrained(folder / "base")
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(),
        chat_template="{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} A:",
    ).save_pretrained(folder / "base")  # fmt: skip
    settings.text_config.vocab_size = len(tokenizer) + 1
    model = Qwen2VLForConditionalGeneration(settings)
    spread(model, 0.3)
    head = nn.Sequential(
        nn.Linear(16, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    spread(head)
    old = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for key, value in model.state_dict().items()
    }
    old |= {f"rm_head.{key}": value for key, value in head.state_dict().items()}
    save_file({key: value.clone() for key, value in old.items()}, folder / "HPSv3.safetensors")
    (folder / "ask.txt").write_text("Rate the image of {text_prompt}. Rating: <|Reward|>")
    return {
        "model": str(folder), "base": str(folder / "base"), "instruction": str(folder / "ask.txt"), "dtype": "float32"
    }  # fmt: skip


def reconstruct_file(folder: Path) -> dict[str, Any]:
    """A reconstruction that sees all but the finest detail."""
    (folder / "recon.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Config:\n    pass\n\n\n"
        "def build(config):\n"
        "    from torch.nn.functional import avg_pool2d, interpolate\n"
        "    return lambda views, meta: interpolate(\n"
        "        avg_pool2d(views.flatten(0, 1), 4), views.shape[-2:]\n"
        "    ).view_as(views)\n"
    )
    return {"reconstruct": str(folder / "recon.py")}


def clip_with_head(folder: Path) -> dict[str, Any]:
    tiny_clip_folder(folder)
    head_file(folder / AESTHETIC, 16)
    return {"model": str(folder)}


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, as in photographs: resampling of pure noise is no test of preprocessing."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x / 9 + y / 17 + seed), np.cos(x / 13 - seed), np.sin(y / (7 + seed))]
    return ((np.stack(waves, -1) * 0.45 + 0.5) * 255).astype(np.uint8)


OPTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "aesthetic": clip_with_head,
    "brightness": lambda folder: {},
    "clip_score": lambda folder: {"model": str(tiny_clip_folder(folder))},
    "color": lambda folder: {"color": "0.4 0.5 0.6"},
    "dino": dino_folder,
    "diversity": lambda folder: {"features": "clip", "model": str(tiny_clip_folder(folder))},
    "hpsv2": hpsv2_file,
    "hpsv3": hpsv3_files,
    "image_reward": image_reward_file,
    "jpeg": lambda folder: {},
    "mrc": reconstruct_file,
    "oracle": lambda folder: {"subject": "bumble"},
    "pickscore": lambda folder: {"model": str(tiny_clip_folder(folder))},
    "vqa_score": vlm_folder,
}
"""Options with which each reward module loads from a folder, which they fill."""
