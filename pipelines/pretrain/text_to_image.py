"""Train the text encoder and the UNet of pocket-sd together, from nothing, on latents of the pocket world.

    python pipelines/pretrain/text_to_image.py --vae runs/pretrain/vae/model --out runs/pretrain/sd

The latents of ``--scenes`` scenes are computed once; captions are drawn afresh each time a scene is used and never
from the held-out tenth. Two things teach the order of a relation, which a small model otherwise takes for a coin toss:
the text encoder first learns alone to tell from the end of a caption what stands on which side, and scenes of two
objects come in twins, equal but for their relation and seen through the same noise.

    python pipelines/pretrain/text_to_image.py --init runs/pretrain/sd/model --out runs/pretrain/sd2 \\
        --scenes 40000 --steps 3000 --lr 8e-4

trains the UNet alone for another while, mostly on single objects, of which the first part leaves some out; a third of
them now have a second colour and a pattern, as the subjects of fine-tuning will.
Run either again to go on after an interruption. The finished pipeline lands in ``<out>/model``.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from PIL import Image
from pocket_tokenizer import MAX_LENGTH, build_tokenizer
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from visiontune.pocket.oracle import matches
from visiontune.pocket.scenes import TRIGGERS, caption, held_out, patterned, sample_scene, stream, vocabulary
from visiontune.pocket.world import COLORS, SHAPES, SIZE, Scene, render
from visiontune.training.pretrain import fit, images_to_tensor

KINDS = {"one": 0.25, "two": 0.55, "many": 0.12, "three": 0.08}
LATER_KINDS = {"one": 0.55, "two": 0.3, "many": 0.08, "three": 0.07}
LATER_PATTERNS = 0.35
DROPOUT = 0.1
SNR_GAMMA = 5.0
READING_WEIGHT = 0.02
WIDTH = 128
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIDES = tuple(OPPOSITE)


def build(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, UNet2DConditionModel, DDIMScheduler]:
    """A 0.9 M parameter CLIP text encoder, a 4.3 M parameter UNet, and Stable Diffusion's noise schedule."""
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return text, unet, scheduler


# ---------------------------------------------------------------------------------------------------- scenes


def twin(scene: Scene) -> Scene:
    """The same objects in the opposite order: places mirrored, relation inverted."""
    assert scene.relation
    sideways = scene.relation in ("left of", "right of")
    things = tuple(replace(t, x=SIZE - t.x) if sideways else replace(t, y=SIZE - t.y) for t in scene.things)
    return replace(scene, things=things, relation=OPPOSITE[scene.relation])


def training_scenes(count: int, kinds: dict[str, float], seed: int, patterns: float = 0.0) -> list[Scene]:
    """``count`` scenes in pairs: a scene of two objects is followed by its twin, any other by another of its kind.

    A share ``patterns`` of the single objects is two-coloured.
    """
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        kind = str(rng.choice(list(kinds), p=list(kinds.values())))
        scene = sample_scene(rng, kind)
        pair = [scene, twin(scene) if scene.relation else sample_scene(rng, kind)]
        scenes += [patterned(s, rng, patterns) for s in pair] if kind == "one" else pair
    return scenes


@torch.no_grad()
def latents_of(scenes: list[Scene], vae: AutoencoderKL, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Scaled posterior means ``[n, 4, 16, 16]`` in bf16, of pictures grey where they are ``hidden [n, 1, 64, 64]``."""
    parts = []
    for i in tqdm(range(0, len(scenes), 64), desc="latents", mininterval=10):
        pixels = images_to_tensor([render(s) for s in scenes[i : i + 64]])
        if hidden is not None:
            pixels = pixels * ~hidden[i : i + 64]
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(pixels).latent_dist.mean
        parts.append((mean.float() * vae.config.scaling_factor).bfloat16())
    return torch.cat(parts)


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption outside the held-out tenth."""
    while held_out(text := caption(scene, rng)):
        pass
    return text


def training_captions(scenes: list[Scene], seed: list[int]) -> list[str]:
    """One caption a scene; the two of a pair are worded alike."""
    return [training_caption(scene, np.random.default_rng([*seed, i // 2])) for i, scene in enumerate(scenes)]


@torch.no_grad()
def lengthen_unseen(text: CLIPTextModel, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A copy in which the words that no caption holds have vectors as long as the trained ones.

    They keep the directions of their initialisation; as short as they were, a trigger word would hardly tell one
    prompt from another.
    """
    text = copy.deepcopy(text)
    embedding = text.get_input_embeddings().weight
    words = [word for word in vocabulary() if word not in TRIGGERS]
    seen = sorted({token for ids in tokenizer(words).input_ids for token in ids})
    lengths = embedding.norm(dim=1, keepdim=True)
    unseen = torch.ones(len(embedding), dtype=torch.bool)
    unseen[seen] = False
    embedding[unseen] *= lengths[seen].median() / lengths[unseen]
    return text


# ---------------------------------------------------------------------------------------------------- sides


def sides(scenes: list[Scene]) -> torch.Tensor:
    """What stands left, right, above and below of the other: class numbers ``int64 [n, 4]``, 0 for nothing."""
    table = torch.zeros(len(scenes), len(SIDES), dtype=torch.int64)
    for row, scene in zip(table, scenes, strict=True):
        if scene.relation:
            for thing, relation in zip(scene.things, (scene.relation, OPPOSITE[scene.relation]), strict=True):
                row[SIDES.index(relation)] = (
                    1 + SHAPES.index(thing.shape) * len(COLORS) + list(COLORS).index(thing.color)
                )
    return table


class SidesHead(nn.Linear):
    """Reads what stands on each side from the hidden states at and after the end of a caption. Not shipped."""

    def __init__(self) -> None:
        super().__init__(WIDTH, len(SIDES) * (1 + len(SHAPES) * len(COLORS)))

    def loss(self, hidden: torch.Tensor, ended: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
        """Cross-entropy; ``hidden [b, n, d]``, ``ended`` (bool ``[b, n]``) marks the end token and the padding."""
        logits = self(hidden[ended]).float().unflatten(-1, (len(SIDES), -1))
        target = sides(scenes).repeat_interleave(ended.sum(1), 0)
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, default=Path("runs/pretrain/vae/model"))
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain/sd"))
    parser.add_argument("--init", type=Path, help="the pipeline of an earlier run, whose UNet is trained further")
    parser.add_argument("--scenes", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--reading-steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--compile", action="store_true", help="compile the UNet; 1.5 times faster, needs a C++ compiler"
    )
    parser.add_argument("--probe-every", type=int, default=1000)
    args = parser.parse_args()
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    text, unet, scheduler = build(tokenizer)
    # On a CPU the fused attention's backward is the slower one for sequences as short as these (1.4 x a step).
    text.set_attn_implementation("eager")
    unet.set_attn_processor(AttnProcessor())
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    if args.init:
        trained = StableDiffusionPipeline.from_pretrained(args.init)
        text.load_state_dict(trained.text_encoder.state_dict())
        unet.load_state_dict(trained.unet.state_dict())
    if args.init:
        scenes = training_scenes(args.scenes, LATER_KINDS, 38, LATER_PATTERNS)
    else:
        scenes = training_scenes(args.scenes, KINDS, 31)
    file = args.out / "latents.pt"
    if not file.exists():
        torch.save(latents_of(scenes, vae), file)
    latents = torch.load(file, weights_only=True)
    head = SidesHead()

    def tokens(prompts: list[str]) -> torch.Tensor:
        return tokenizer(prompts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids

    def reading_loss(step: int) -> dict[str, torch.Tensor]:
        rows = np.random.default_rng([33, step]).integers(len(scenes) // 2, size=args.batch)
        pairs = [scenes[2 * i + k] for i in rows for k in (0, 1)]
        ids = tokens(training_captions(pairs, [34, step]))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = text(ids).last_hidden_state
        return {"loss": head.loss(hidden.float(), ids == tokenizer.eos_token_id, pairs)}

    if args.init:
        text.requires_grad_(False)
    else:
        reader = nn.ModuleDict({"text": text, "head": head})
        fit(reader, reading_loss, steps=args.reading_steps, lr=args.lr, folder=args.out / "reader", warmup=100)
    model = nn.ModuleDict({"text": text, "unet": unet, "head": head})
    denoise = torch.compile(unet) if args.compile else unet

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        draw, generator = np.random.default_rng([37 if args.init else 32, step]), torch.Generator().manual_seed(step)
        first = 2 * draw.integers(len(scenes) // 2, size=args.batch // 2)
        rows = np.stack([first, first + 1], 1).ravel()
        pairs = [scenes[i] for i in rows]
        x_0 = latents[rows].float()
        ids = tokens(training_captions(pairs, [35, step]))
        eps = torch.randn(x_0.shape, generator=generator)
        u = torch.rand(args.batch, generator=generator)
        if args.init:  # how many objects there will be is decided at high noise: half of the rows dwell there
            u[len(u) // 2 :].sqrt_()
        t = (1000 * u).long()
        twins = torch.tensor([scene.relation is not None for scene in pairs[::2]])
        eps[1::2][twins], t[1::2][twins] = eps[::2][twins], t[::2][twins]
        empty = torch.rand(args.batch // 2, generator=generator) < DROPOUT
        ids[empty.repeat_interleave(2)] = tokens([""])
        x_t = scheduler.add_noise(x_0, eps, t)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = text(ids).last_hidden_state
            prediction = denoise(x_t, t, hidden).sample
        error = (prediction.float() - eps).pow(2).mean((1, 2, 3))
        snr = compute_snr(scheduler, t)
        denoising = (error * snr.clamp(max=SNR_GAMMA) / snr).mean()
        if args.init:
            return {"loss": denoising}
        kept = ~empty.repeat_interleave(2)
        captioned = [scene for scene, keep in zip(pairs, kept, strict=True) if keep]
        reading = head.loss(hidden[kept].float(), ids[kept] == tokenizer.eos_token_id, captioned)
        return {"loss": denoising + READING_WEIGHT * reading, "denoising": denoising, "reading": reading}

    def pipeline(averaged: nn.Module) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=vae, text_encoder=lengthen_unseen(averaged["text"], tokenizer), tokenizer=tokenizer,
            unet=averaged["unet"], scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def probe(averaged: nn.Module, step: int) -> None:
        pipe = pipeline(averaged)
        if step % args.probe_every and step != args.steps:
            return
        pipe.save_pretrained(args.out / "model")
        pipe.set_progress_bar_config(disable=True)
        pictures, verdict = [], {}
        for kind in ("one", "two"):
            pairs = stream(77, kind, holdout=True)
            prompts = [next(pairs)[1] for _ in range(40)]
            generator = torch.Generator().manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16):
                images = pipe(prompts, num_inference_steps=25, guidance_scale=4.0, height=64, width=64,
                              generator=generator, output_type="np").images  # fmt: skip
            arrays = (images * 255).round().astype(np.uint8)
            verdict[kind] = float(np.mean([matches(a, p) for a, p in zip(arrays, prompts, strict=True)]))
            pictures.append(np.concatenate([np.concatenate(arrays[i : i + 10], 1) for i in range(0, 40, 10)]))
        print(f"step {step}: prompt accuracy {verdict}", flush=True)
        Image.fromarray(np.concatenate(pictures)).save(args.out / f"samples-{step:05d}.png")

    fit(
        model,
        loss_at,
        steps=args.steps,
        lr=args.lr,
        folder=args.out,
        warmup=100 if args.init else 300,
        ema=0.999,
        probe=probe,
    )
    tokenizer.backend_tokenizer.model.save(str(args.out / "model" / "tokenizer"))


if __name__ == "__main__":
    main()
