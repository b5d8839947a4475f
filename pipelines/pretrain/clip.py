"""Train pocket-clip on pictures and captions of the pocket world, and write it for transformers and for open_clip.

    python pipelines/pretrain/clip.py --out runs/pretrain/clip

Run it again to go on after an interruption. Both formats of the same weights land in ``<out>/model``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from pocket_tokenizer import MAX_LENGTH, build_tokenizer
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from visiontune.pocket.scenes import caption, held_out, patterned, sample_scene, stream
from visiontune.pocket.world import SIZE, render
from visiontune.training.pretrain import fit, images_to_tensor

WIDTH, LAYERS, HEADS, PATCH = 128, 4, 4, 8
PATTERNS = 0.35  # share of the single objects that have a second colour


def build(vocab_size: int, end: int) -> CLIPModel:
    """A 1.7 M parameter CLIP: both towers 4 layers of width 128, 8x8 pixel patches."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    shared |= {"num_attention_heads": HEADS, "projection_dim": WIDTH}
    text = {**shared, "vocab_size": vocab_size, "max_position_embeddings": MAX_LENGTH}
    text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    vision = {**shared, "image_size": SIZE, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def _block_to_open_clip(state: dict[str, torch.Tensor], source: str, target: str) -> dict[str, torch.Tensor]:
    """One transformer layer: open_clip keeps query, key and value in one matrix and names the parts otherwise."""
    out = {}
    for kind in ("weight", "bias"):
        qkv = [state[f"{source}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
        out[f"{target}.attn.in_proj_{kind}"] = torch.cat(qkv)
        out[f"{target}.attn.out_proj.{kind}"] = state[f"{source}.self_attn.out_proj.{kind}"]
        for mine, theirs in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                             ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
            out[f"{target}.{theirs}.{kind}"] = state[f"{source}.{mine}.{kind}"]
    return out


def to_open_clip(model: CLIPModel) -> dict[str, torch.Tensor]:
    """The state dict of the equal open_clip model."""
    s = {k: v.detach() for k, v in model.state_dict().items()}
    out = {
        "logit_scale": s["logit_scale"],
        "positional_embedding": s["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": s["text_model.embeddings.token_embedding.weight"],
        "text_projection": s["text_projection.weight"].T,
        "visual.class_embedding": s["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": s["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": s["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": s["visual_projection.weight"].T,
    }
    norms = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm"}
    norms["visual.ln_post"] = "vision_model.post_layernorm"
    for target, source in norms.items():
        out |= {f"{target}.{kind}": s[f"{source}.{kind}"] for kind in ("weight", "bias")}
    for i in range(LAYERS):
        out |= _block_to_open_clip(s, f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}")
        out |= _block_to_open_clip(s, f"vision_model.encoder.layers.{i}", f"visual.transformer.resblocks.{i}")
    return {k: v.contiguous() for k, v in out.items()}


def open_clip_config(vocab_size: int) -> dict:
    """The ``open_clip_config.json`` of the model."""
    tower = {"layers": LAYERS, "width": WIDTH}
    text = {**tower, "context_length": MAX_LENGTH, "vocab_size": vocab_size, "heads": HEADS}
    text |= {"hf_tokenizer_name": "pocket-clip", "tokenizer_kwargs": {"strip_sep_token": False}}
    vision = {**tower, "image_size": SIZE, "patch_size": PATCH, "head_width": WIDTH // HEADS}
    model = {"embed_dim": WIDTH, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD, "size": SIZE, "interpolation": "bicubic"}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def retrieval(model: CLIPModel, tokenizer, mean: torch.Tensor, std: torch.Tensor, seed: int = 501) -> float:
    """Image-to-text top-1 among 100 fully detailed held-out captions."""
    rng, pairs = np.random.default_rng(seed), {}
    while len(pairs) < 100:
        scene = sample_scene(rng)
        text = caption(scene, rng, detail=1.0)
        if held_out(text):
            pairs[text] = scene
    pixels = (images_to_tensor([render(s) for s in pairs.values()]) / 2 + 0.5 - mean) / std
    ids = tokenizer(list(pairs), padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
    return float((logits.argmax(1) == torch.arange(100)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain/clip"))
    parser.add_argument("--scenes", type=int, default=30_000)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build(len(tokenizer), tokenizer.eos_token_id)
    model.set_attn_implementation("eager")  # faster than fused attention on a CPU at this length
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pairs, rng = stream(41), np.random.default_rng(43)
    scenes = [next(pairs)[0] for _ in range(args.scenes)]
    scenes = [patterned(s, rng, PATTERNS) if len(s.things) == 1 else s for s in scenes]
    pictures = torch.from_numpy(np.stack([render(s) for s in scenes]))

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        draw, generator = np.random.default_rng([42, step]), torch.Generator().manual_seed(step)
        rows = draw.integers(len(scenes), size=args.batch)
        texts = []
        for i in rows:
            while held_out(text := caption(scenes[i], draw, detail=0.8)):
                pass
            texts.append(text)
        ids = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
        pixels = pictures[rows].permute(0, 3, 1, 2).float() / 255
        pixels = pixels + 0.02 * torch.randn(pixels.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, pixel_values=(pixels - mean) / std).logits_per_image
        target = torch.arange(args.batch)
        logits = logits.float()
        loss = (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2
        return {"loss": loss, "accuracy": (logits.argmax(1) == target).float().mean()}

    def probe(averaged: nn.Module, step: int) -> None:
        print(f"step {step}: retrieval {retrieval(averaged, tokenizer, mean, std):.3f}", flush=True)

    averaged = fit(model, loss_at, steps=args.steps, lr=args.lr, folder=args.out, warmup=200, ema=0.998, probe=probe)
    folder = args.out / "model"
    averaged.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    save_file(to_open_clip(averaged), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(len(tokenizer)), indent=2) + "\n")


if __name__ == "__main__":
    main()
