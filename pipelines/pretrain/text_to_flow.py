"""Train the transformer of pocket-flow, a Stable Diffusion 3 in small, on latents of the pocket world.

    python pipelines/pretrain/text_to_flow.py --out runs/pretrain/flow

The text encoders are those of pocket-sd and pocket-clip as they are, of which the second tells apart what stands on
which side; the VAE is pocket-sd's. What is trained is an MMDiT of 7 million parameters on 8 x 8 patches, by flow
matching with logit-normal times (Esser et al., 2024, arXiv 2403.03206). Scenes of two objects come in twins, equal but
for their relation and seen through the same noise; a part of the single objects has a second colour and a pattern, as
the subjects of fine-tuning will.

A transformer learns shapes from pictures alone very slowly. Two things help it: a head that is thrown away afterwards
has the middle of it say which shape and which colour stands on every patch, and up to ``--data-from`` it is shown the
flow that pocket-sd sees in the same latents, a mean without the noise of single pictures. Only where pocket-sd was
never trained, at the highest noise, and in the last part are pictures themselves the target. There is no T5, and no
zeros stand for it; in the very last part one step in eight has the 256 which the stock pipeline puts there unless it
is told otherwise, so that it draws well either way.

    python pipelines/pretrain/text_to_flow.py --init visiontune/assets/pocket-flow --out runs/pretrain/flow2

goes on, with a schedule of its own, from an earlier transformer. Run either again to go on after an interruption. The
finished pipeline lands in ``<out>/model``.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from clip import NOTHING, things_on_patches
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from ship import ASSETS
from text_to_image import DROPOUT, latents_of, training_captions, training_scenes
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from visiontune.models import load
from visiontune.pocket.oracle import matches
from visiontune.pocket.scenes import stream
from visiontune.pocket.world import COLORS
from visiontune.training.pretrain import fit

ZEROS, EVERY = 256, 8  # of T5 in the stock pipeline, and how often they are seen in the last part
KINDS = {"one": 0.4, "two": 0.4, "many": 0.1, "three": 0.1}
PATTERNS = 0.35
HEADS, HEAD, LAYERS = 5, 32, 8
MIDDLE, NAMING_WEIGHT = 4, 0.1  # after how many layers shapes and colours are read, and how much that counts
HIGHER, WIDTH = 0.2, 1.3  # of the logits of the times: what stands where is decided at high noise, colours at low
KNOWN = 0.9  # share of noise up to which pocket-sd teaches: beyond it, it hardly sees a picture


def encoders(text: CLIPTextModel) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """That of pocket-sd, whose end token goes through as it is, and that of pocket-clip."""
    config = copy.deepcopy(text.config)
    config.projection_dim = config.hidden_size
    first = CLIPTextModelWithProjection(config)
    missing, unexpected = first.load_state_dict({f"text_model.{k}": v for k, v in text.state_dict().items()}, False)
    assert missing == ["text_projection.weight"] and not unexpected
    nn.init.eye_(first.text_projection.weight)
    second = CLIPTextModelWithProjection.from_pretrained(ASSETS / "pocket-clip", dtype=torch.float32)
    return first.eval().requires_grad_(False), second.eval().requires_grad_(False)


def build(first: CLIPTextModelWithProjection, second: CLIPTextModelWithProjection) -> SD3Transformer2DModel:
    """The transformer for what the two give."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=first.config.hidden_size + second.config.hidden_size,
        caption_projection_dim=HEADS * HEAD,
        pooled_projection_dim=first.config.projection_dim + second.config.projection_dim,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


class Naming(nn.Linear):
    """Reads the shape and the colour on every patch from the middle of the transformer. Not shipped."""

    def __init__(self) -> None:
        super().__init__(HEADS * HEAD, NOTHING + 1 + len(COLORS))

    def loss(self, hidden: Tensor, shape: Tensor, color: Tensor) -> Tensor:
        """Cross-entropy, bare ground and objects counting alike; ``hidden [b, 64, d]``, the truth ``long [b, 64]``."""
        shapes, colors = self(hidden).split([NOTHING + 1, len(COLORS)], -1)
        seen = shape != NOTHING
        bare, things = (nn.functional.cross_entropy(shapes[at], shape[at]) for at in (~seen, seen))
        return bare + things + nn.functional.cross_entropy(colors[seen], color[seen])


class Teacher:
    """The flow that a Stable Diffusion which predicts noise sees in latents of a straight path."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self.pipe = pipe
        kept = pipe.scheduler.alphas_cumprod.double()
        self.levels = ((1 - kept) / kept).sqrt().log().numpy()

    @torch.no_grad()
    def flow(self, x_t: Tensor, sigma: Tensor, texts: list[str]) -> Tensor:
        """``eps - x_0`` expected at ``x_t [b, 4, h, w]`` of noise ``sigma [b]`` below 1.

        Scaled to unit variance, a state of the straight path is one of the other process, at the timestep where noise
        and picture stand in the same ratio; its noise is the same, and ``x_t`` gives the picture.
        """
        level = sigma.view(-1, 1, 1, 1)
        t = np.interp(sigma.logit().numpy(), self.levels, np.arange(len(self.levels)))
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        hidden = self.pipe.text_encoder(ids).last_hidden_state
        eps = self.pipe.unet(x_t / torch.hypot(level, 1 - level), torch.from_numpy(t).float(), hidden).sample
        return (eps.float() - x_t) / (1 - level)


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, and AdamW at half its rate for what is left."""
    turned, rest = [], []
    for name, p in model.named_parameters():
        (turned if p.ndim == 2 and "transformer_blocks" in name else rest).append(p)
    return [
        torch.optim.Muon(turned, lr=lr, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.99), weight_decay=1e-2),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain/flow"))
    parser.add_argument("--init", type=Path, help="an earlier pipeline, whose transformer is trained further")
    parser.add_argument("--scenes", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--data-from", type=int, default=5000, help="step up to which pocket-sd teaches")
    parser.add_argument("--zeros-from", type=int, default=5500, help="step up to which no zeros stand for a T5")
    parser.add_argument("--probe-every", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    base = load("pocket/sd").pipe
    base.vae.register_to_config(shift_factor=0.0)  # which the pipeline of Stable Diffusion 3 wants to know
    first, second = encoders(base.text_encoder)
    transformer, naming, teacher = build(first, second), Naming(), Teacher(base)
    if args.init:
        trained = SD3Transformer2DModel.from_pretrained(args.init, subfolder="transformer", dtype=torch.float32)
        transformer.load_state_dict(trained.state_dict())
    middle: list[Tensor] = []
    transformer.transformer_blocks[MIDDLE - 1].register_forward_hook(lambda _, __, out: middle.append(out[1]))
    scenes = training_scenes(args.scenes, KINDS, 41, PATTERNS)
    file = args.out / "latents.pt"
    if not file.exists():
        torch.save(latents_of(scenes, base.vae), file)
    latents = torch.load(file, weights_only=True)
    shapes, colors = things_on_patches(scenes)[:, :2].long().unbind(1)

    def pipeline(trained: nn.Module) -> StableDiffusion3Pipeline:
        tokenizer: CLIPTokenizer = base.tokenizer
        made = StableDiffusion3Pipeline(
            transformer=trained,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=base.vae,
            text_encoder=first,
            tokenizer=tokenizer,
            text_encoder_2=second,
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        made.set_progress_bar_config(disable=True)
        return made

    reading = pipeline(transformer)

    @torch.no_grad()
    def read(prompts: list[str], zeros: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, _, pooled, _ = reading.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=zeros
        )
        return tokens, pooled

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        draw, generator = np.random.default_rng([42, step]), torch.Generator().manual_seed(step)
        start = 2 * draw.integers(len(scenes) // 2, size=args.batch // 2)
        rows = np.stack([start, start + 1], 1).ravel()
        pairs = [scenes[i] for i in rows]
        captions = training_captions(pairs, [45, step])
        empty = (torch.rand(args.batch // 2, generator=generator) < DROPOUT).repeat_interleave(2)
        texts = ["" if e else caption for e, caption in zip(empty, captions, strict=True)]
        x_0 = latents[rows].float()
        eps = torch.randn(x_0.shape, generator=generator)
        sigma = torch.sigmoid(HIGHER + WIDTH * torch.randn(args.batch, generator=generator))
        twins = torch.tensor([scene.relation is not None for scene in pairs[::2]])
        eps[1::2][twins], sigma[1::2][twins] = eps[::2][twins], sigma[::2][twins]
        level = sigma.view(-1, 1, 1, 1)
        x_t, flow = (1 - level) * x_0 + level * eps, eps - x_0
        middle.clear()
        with torch.autocast("cpu", torch.bfloat16):
            tokens, pooled = read(texts, ZEROS if step >= args.zeros_from and step % EVERY == 0 else 0)
            if step < args.data_from:
                flow = torch.where(level < KNOWN, teacher.flow(x_t, sigma, texts), flow)
            predicted = transformer(
                x_t,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                timestep=1000 * sigma,
                return_dict=False,
            )[0]
        error = (predicted.float() - flow).square().mean()
        named = naming.loss(middle[0].float(), shapes[rows], colors[rows])
        return {"loss": error + NAMING_WEIGHT * named, "flow": error, "named": named}

    def probe(averaged: nn.Module, step: int) -> None:
        if step % args.probe_every and step != args.steps:
            return
        pipe = pipeline(averaged["transformer"])
        pipe.save_pretrained(args.out / "model")
        pictures, verdict = [], {}
        for kind in ("one", "two", "three"):
            pairs = stream(77, kind, holdout=True)
            prompts = [next(pairs)[1] for _ in range(40)]
            generator = torch.Generator().manual_seed(0)
            images = pipe(
                prompts, num_inference_steps=25, guidance_scale=4.0, height=64, width=64, generator=generator,
                output_type="np", max_sequence_length=0,
            ).images  # fmt: skip
            arrays = (images * 255).round().astype(np.uint8)
            verdict[kind] = float(np.mean([matches(a, p) for a, p in zip(arrays, prompts, strict=True)]))
            pictures.append(np.concatenate([np.concatenate(arrays[i : i + 10], 1) for i in range(0, 40, 10)]))
        print(f"step {step}: prompt accuracy {verdict}", flush=True)
        Image.fromarray(np.concatenate(pictures)).save(args.out / f"samples-{step:05d}.png")

    model = nn.ModuleDict({"transformer": transformer, "naming": naming})
    fit(
        model,
        loss_at,
        steps=args.steps,
        optimizers=optimizers(model, args.lr),
        folder=args.out,
        ema=0.999,
        probe=probe,
    )


if __name__ == "__main__":
    main()
