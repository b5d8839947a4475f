"""Train pocket-clip on pictures and captions of the pocket world, and write it for transformers and for open_clip.

    python pipelines/pretrain/clip.py --out runs/pretrain/clip

Run it again to go on after an interruption. Both formats of the same weights land in ``<out>/model``.

A contrastive loss over scenes drawn at random is won by colour, size and ground, and leaves a model that is blind to
shape. So a batch is made of *families* here: a scene and others that differ from it in one word or two, each with a
picture and a caption of its own, and every one of them is a hard negative of the others in both directions. Captions
that are true of several pictures count as right for each. Besides, heads that are thrown away afterwards have patches,
words, pictures and captions say what they know of shapes, colours, sizes, sides and grounds: who stands where is learnt
from a contrast alone very slowly. While patches are all that is taught, and a while longer, bare ground is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pocket_tokenizer import MAX_LENGTH, build_tokenizer, save_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from visiontune.evaluation.attributes import alike, audit, meaning, recoloured, with_thing
from visiontune.files import atomic_write
from visiontune.models.clip import TransformersClip
from visiontune.ops.pixels import Framing, Preprocess
from visiontune.pocket.oracle import CHROMA_THRESHOLD
from visiontune.pocket.scenes import caption, held_out, patterned, sample_scene
from visiontune.pocket.world import (
    COLORS,
    RADII,
    RELATIONS,
    SHAPES,
    SIZE,
    SUBJECTS,
    TEXTURES,
    TONES,
    Scene,
    render,
)
from visiontune.training.pretrain import fit

WIDTH, LAYERS, HEADS, PATCH = 128, 4, 4, 8
PATTERNS = 0.35  # share of the single objects that have a second colour
FAMILY = 8
KINDS = (0.25, 0.45, 0.15, 0.15)  # more objects a picture show more shapes in the same time
SIDES = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
SAID = ((True, True), (True, False), (False, True), (False, False))  # sizes, ground: what a caption may name
SIDE = SIZE // PATCH
FEW = 30  # patches enough for all objects of nearly any scene
NAMED = (*SHAPES, *COLORS)
GROUNDS = tuple((tone, texture) for tone in TONES for texture in TEXTURES)
NOTHING = len(SHAPES)  # the shape of a patch without an object


def build(vocab_size: int, end: int) -> CLIPModel:
    """A 1.7 M parameter CLIP: both towers 4 layers of width 128, 8x8 pixel patches."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    shared |= {"num_attention_heads": HEADS, "projection_dim": WIDTH}
    text = {**shared, "vocab_size": vocab_size, "max_position_embeddings": MAX_LENGTH}
    text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    vision = {**shared, "image_size": SIZE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight[1:] = grid_waves(SIDE, WIDTH)
    return model


def grid_waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column ``[side * side, width]``, from which attention to neighbours is easy."""
    rates = 10 ** -(torch.arange(width // 4) / (width // 4))  # wave lengths from 6 to 60 patches
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width) / 2


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


# ---------------------------------------------------------------------------------------------------- scenes


def redrawn(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same things in other places: a fresh scene of as many objects of those sizes, painted over."""
    kind = "one" if len(scene.things) == 1 else "two" if scene.relation else "many" if alike(scene) else "three"
    while True:
        fresh = sample_scene(rng, kind)
        if fresh.relation == scene.relation and [t.size for t in fresh.things] == [t.size for t in scene.things]:
            break
    things = [
        replace(old, x=new.x, y=new.y, radius=new.radius) for old, new in zip(scene.things, fresh.things, strict=True)
    ]
    return replace(scene, things=tuple(things))


def edits(scene: Scene) -> list[str]:
    """What can be changed about a scene so that it can be drawn again; what is hard to see comes oftener."""
    n, same = len(scene.things), alike(scene)
    single = n == 1 and scene.things[0].size == "small" and not scene.things[0].accent
    kinds = ["shape"] * 4 + ["color"] + ["size"] * bool(scene.relation or n == 1) + ["ground"]
    kinds += ["relation"] * 4 if scene.relation else []
    kinds += ["colors", "colors", "shapes"] if n > 1 and not same else []
    return kinds + ["count"] * 2 * (same or single)


def edited(scene: Scene, rng: np.random.Generator, edit: str) -> Scene:
    """The scene with one thing about it drawn anew."""
    n = len(scene.things)
    i = int(rng.integers(n))
    j = (i + 1) % n
    if edit == "shape":
        return with_thing(scene, i, shape=SHAPES[rng.integers(len(SHAPES))])
    if edit == "color":
        free = [color for color in COLORS if color != scene.things[i].accent]
        return with_thing(scene, i, color=free[rng.integers(len(free))])
    if edit == "size":
        return with_thing(scene, i, radius=sum(RADII.values()) - scene.things[i].radius)
    if edit == "relation":
        return replace(scene, relation=RELATIONS[rng.integers(4)])
    if edit == "count":
        return replace(scene, things=scene.things[:1] * int(rng.integers(1, 4)))
    if edit == "colors":
        return recoloured(scene, i, j)
    if edit == "shapes":
        one, other = scene.things[i], scene.things[j]
        return with_thing(with_thing(scene, i, shape=other.shape), j, shape=one.shape)
    return replace(scene, tone=list(TONES)[rng.integers(2)], texture=TEXTURES[rng.integers(4)])


def wrong(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """A scene a word or two off, and its full caption; grounds and sizes, rare in families, come oftest."""
    kinds = ["ground"] * 4 + ["size", "size", *edits(scene)]
    while True:
        other = edited(scene, rng, kinds[rng.integers(len(kinds))])
        text = caption(other, rng, detail=1.0)
        if not held_out(text):  # of some scenes every full caption is
            return other, text


def family(rng: np.random.Generator, size: int = FAMILY) -> list[Scene]:
    """A scene and others a word or two away from it, no two of one meaning, each in a layout of its own."""
    first = sample_scene(rng, str(rng.choice(["one", "two", "many", "three"], p=KINDS)))
    if len(first.things) == 1:
        first = patterned(first, rng, PATTERNS)
    members = {meaning(first): first}
    while len(members) < size:
        base = first if rng.random() < 0.7 else list(members.values())[rng.integers(len(members))]
        kinds = edits(base)
        other = edited(base, rng, kinds[rng.integers(len(kinds))])
        if _allowed(base, other) and meaning(other) not in members:
            members[meaning(other)] = redrawn(other, rng)
    return list(members.values())


def _allowed(base: Scene, other: Scene) -> bool:
    """Whether an edit keeps several objects alike or each its own, and comes near no held-out subject."""
    same_kind = 1 in (len(base.things), len(other.things)) or alike(base) == alike(other)
    subjects = [{s.color, s.accent} for s in SUBJECTS.values()]
    return same_kind and not any({t.color, t.accent} in subjects for t in other.things)


@dataclass(frozen=True, kw_only=True)
class Patches:
    """What each of the 64 patches of ``b`` pictures shows: what the vision tower is taught besides the captions.

    Attributes:
        shape: ``long [b, 64]``, ``NOTHING`` on bare ground.
        color: ``long [b, 64]``.
        place: ``float [b, 64, 3]``, from the patch to the centre of its object in units of 16 pixels, and its size.
        own: ``long [b, 64]``, the number of the object in its caption, at most 2; 2 on bare ground.
        mask: ``float [b, 64, 64]``, 1 where a pixel of the patch belongs to an object.
    """

    shape: Tensor
    color: Tensor
    place: Tensor
    own: Tensor
    mask: Tensor

    def of(self, index: Tensor) -> Patches:
        """The patches of an index ``[b, k]`` alone."""

        def pick(values: Tensor) -> Tensor:
            return values.gather(
                1, index.view(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
            )

        return Patches(**{name: pick(values) for name, values in vars(self).items()})


def things_on_patches(scenes: list[Scene]) -> Tensor:
    """``float [b, 6, 64]``: shape, colour and number of the object on each patch, and the three of its place."""
    centres = (np.arange(SIDE) + 0.5) * PATCH
    labels = np.zeros((len(scenes), 6, SIDE, SIDE), np.float32)
    labels[:, 0], labels[:, 2] = NOTHING, 2
    for scene, label in zip(scenes, labels, strict=True):
        for number, thing in enumerate(scene.things):
            dx, dy = np.meshgrid(thing.x - centres, thing.y - centres)
            here = np.maximum(abs(dx), abs(dy)) < thing.radius + PATCH / 4
            look = (SHAPES.index(thing.shape), list(COLORS).index(thing.color), min(number, 2))
            for channel, value in zip(
                label, (*look, dx[here] / 16, dy[here] / 16, (thing.radius - 11) / 4), strict=True
            ):
                channel[here] = value
    return torch.from_numpy(labels).flatten(2)


def patches(scenes: list[Scene], pictures: np.ndarray) -> Patches:
    """See :class:`Patches`; objects are the pixels that are not grey."""
    flat = things_on_patches(scenes)
    colored = torch.from_numpy(pictures.max(-1) - pictures.min(-1) > CHROMA_THRESHOLD)
    mask = colored.view(-1, SIDE, PATCH, SIDE, PATCH).transpose(2, 3).reshape(-1, SIDE**2, PATCH**2)
    whole = flat[:, :3].long()
    place = flat[:, 3:].mT
    return Patches(shape=whole[:, 0], color=whole[:, 1], own=whole[:, 2], place=place, mask=mask.float())


def facts(scene: Scene) -> tuple[Tensor, Tensor]:
    """On which side of the other each of two objects stands ``[2, 28]``, and its size ``[2, 14]``.

    Sides are x and y in the rows of its shape and of its colour, sizes 1 or -1; zeros elsewhere and without a relation.
    """
    sides, sizes = torch.zeros(2, len(NAMED), 2), torch.zeros(2, len(NAMED))
    if scene.relation:
        x, y = SIDES[scene.relation.split()[0]]
        for i, (thing, sign) in enumerate(zip(scene.things, (1, -1), strict=True)):
            rows = [NAMED.index(thing.shape), NAMED.index(thing.color)]
            sides[i, rows] = torch.tensor([x * sign, y * sign], dtype=torch.float32)
            sizes[i, rows] = 1.0 if thing.size == "large" else -1.0
    return sides.flatten(1), sizes


def side_heard(ids: Tensor, relations: Tensor, shapes: Tensor) -> Tensor:
    """Which of two objects is known for the first time, with its side, at each word ``[b, n]``; 2 where none is.

    A word sees those before it: the first object's side is known at the relation, the second's at its shape.
    """
    related = torch.isin(ids, relations)
    after = related.cumsum(1) > 0
    return torch.where(related, 0, torch.where(after & torch.isin(ids, shapes), 1, 2))


def size_heard(ids: Tensor, shapes: Tensor) -> Tensor:
    """Which of two objects is known, with its size, at each word ``[b, n]``, which is at its shape; 2 where none is."""
    named = torch.isin(ids, shapes)
    return torch.where(named, named.cumsum(1) - 1, 2).clamp(max=2)


def said(text: str) -> tuple[bool, bool]:
    """Whether a caption names sizes, and whether it names the ground."""
    return "small" in text or "large" in text, "background" in text


class Scenes:
    """Families of scenes with their pictures, which are kept in a file: drawing them takes a minute or two."""

    def __init__(self, folder: Path, n: int, seed: int = 41) -> None:
        rng = np.random.default_rng(seed)
        self.scenes = [scene for _ in range(n // FAMILY) for scene in family(rng)]
        codes = self.codes = dict[tuple, int]()
        keys = [[codes.setdefault(meaning(s, *said), len(codes)) for said in SAID] for s in self.scenes]
        self.keys = torch.tensor(keys)
        file = folder / f"pictures-{seed}-{n}.npy"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            drawn = np.stack([render(s) for s in self.scenes])
            with atomic_write(file) as partial:
                np.save(partial, drawn)
        self.pictures = np.load(file, mmap_mode="r")

    def draw(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of ``size`` scenes, whole families."""
        first = rng.integers(len(self.scenes) // FAMILY, size=size // FAMILY) * FAMILY
        return (first[:, None] + np.arange(FAMILY)).reshape(-1)

    def truth(self, rows: np.ndarray, texts: list[str]) -> Tensor:
        """``bool [b, b]``: whether the picture of a row is rightly described by the text of a column."""
        kept = torch.tensor([SAID.index(said(text)) for text in texts])
        keys = self.keys[rows]  # [b, 4]
        return keys[:, kept] == keys[torch.arange(len(rows)), kept]

    def fits(self, rows: np.ndarray, others: Sequence[Scene]) -> Tensor:
        """``bool [b, n]``: whether the picture of a row is rightly described by the full caption of another scene."""
        return self.keys[rows, :1] == torch.tensor([self.codes.get(meaning(scene), -1) for scene in others])


# ---------------------------------------------------------------------------------------------------- training


class Reader(nn.Module):
    """Heads that read a fact about each of two objects off pictures and captions as a whole, off patches and off words.

    One head reads pictures and captions, so that both write the fact in the same place.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.whole, self.patch, self.word = (nn.Linear(WIDTH, size) for _ in range(3))
        for head in (self.whole, self.patch, self.word):
            nn.init.zeros_(head.weight)  # states are large: random facts would be far off

    def forward(
        self,
        seen: tuple[Tensor, Tensor],
        told: tuple[Tensor, Tensor],
        own: Tensor,
        heard: Tensor,
        facts: Tensor,
        said: Tensor,
    ) -> dict[str, Tensor]:
        """Squared errors.

        Args:
            seen: unit features of pictures ``[b, d]`` and states of their patches ``[b, k, d]``.
            told: unit features of captions ``[b, d]`` and states of their words ``[b, n, d]``.
            own: ``long [b, k]``, the object that a patch shows, 2 on bare ground.
            heard: ``long [b, n]``, the object whose fact is known at a word, 2 where none is.
            facts: ``[b, 2, f]``, zeros where there is none.
            said: ``bool [b]``, whether the caption tells it.
        """
        padded = nn.functional.pad(facts, (0, 0, 0, 1))  # [b, 3, f], zeros for no object
        spoken = padded * said[:, None, None]
        rows = torch.arange(len(facts))[:, None]
        return {
            "picture": _error(self.whole(seen[0] * WIDTH**0.5), padded.sum(1)),
            "caption": _error(self.whole(told[0] * WIDTH**0.5), spoken.sum(1)),
            "patch": _error(self.patch(seen[1]), padded[rows, own]),
            "word": _error(self.word(told[1]), spoken[rows, heard]),
        }


class WithHeads(nn.Module):
    """A CLIP with heads on its patches, which are thrown away after training.

    The first layer shall know which pixels are an object's, the second where and how large it is, the third what it is
    and on which side of another. Words, and pictures and captions as a whole, shall know sides, sizes and grounds too.
    """

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.mask = nn.Linear(WIDTH, PATCH**2)
        self.place = nn.Linear(WIDTH, 3)
        self.look = nn.Linear(WIDTH, NOTHING + 1 + len(COLORS))
        self.sides, self.sizes = Reader(2 * len(NAMED)), Reader(len(NAMED))
        self.ground, self.patch_ground = (nn.Linear(WIDTH, len(GROUNDS)) for _ in range(2))

    def see(self, pixels: Tensor, index: Tensor) -> list[Tensor]:
        """Hidden states ``[b, 1 + k, d]`` before and after every layer, of the class token and the patches of an index.

        Bare ground teaches little, so most of it can be left out while the model is far from done.
        """
        vision = self.clip.vision_model
        x = vision.embeddings(pixels)
        x = torch.cat([x[:, :1], x[:, 1:].gather(1, index[..., None].expand(-1, -1, WIDTH))], 1)
        states = [vision.pre_layrnorm(x)]
        for layer in vision.encoder.layers:
            states.append(layer(states[-1], attention_mask=None))
        return states

    def features(self, last: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features ``[b, d]`` of pictures, by their last hidden state, and of texts; states of the words."""
        image = self.clip.visual_projection(self.clip.vision_model.post_layernorm(last[:, 0]))
        told = self.clip.text_model(input_ids=ids, output_hidden_states=True)
        text = self.clip.text_projection(told.pooler_output)
        return nn.functional.normalize(image, dim=-1), nn.functional.normalize(text, dim=-1), told.hidden_states[-2]

    def ground_loss(
        self, image: Tensor, text: Tensor, patches: Tensor, bare: Tensor, truth: Tensor, said: Tensor
    ) -> Tensor:
        """Cross-entropy of the ground ``[b]`` by pictures, by captions that name it, and by bare patches ``[b, k]``."""
        features = torch.cat([image, text[said]]) * WIDTH**0.5
        whole = nn.functional.cross_entropy(self.ground(features), torch.cat([truth, truth[said]]))
        return whole + nn.functional.cross_entropy(
            self.patch_ground(patches)[bare], truth[:, None].expand_as(bare)[bare]
        )

    def patch_losses(self, states: list[Tensor], truth: Patches) -> dict[str, Tensor]:
        """How wrong the heads are, and the share of the patches of objects whose shape is named right."""
        seen = truth.shape != NOTHING
        look = self.look(states[-2][:, 1:])
        shapes, colors = look[..., : NOTHING + 1], look[..., NOTHING + 1 :]
        return {
            "mask": nn.functional.binary_cross_entropy_with_logits(self.mask(states[1][:, 1:]), truth.mask),
            "place": nn.functional.smooth_l1_loss(self.place(states[2][:, 1:])[seen], truth.place[seen], beta=0.1),
            "shape": nn.functional.cross_entropy(shapes.flatten(0, 1), truth.shape.flatten()),
            "color": nn.functional.cross_entropy(colors[seen], truth.color[seen]),
            "patches_right": (shapes.argmax(-1) == truth.shape)[seen].float().mean(),
        }


def _error(read: Tensor, truth: Tensor) -> Tensor:
    """Mean squared distance over those that stand beside something."""
    related = truth.abs().sum(-1, keepdim=True) > 0
    return ((read - truth).square() * related).sum() / related.sum().clamp_min(1)


def contrast(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy against every right answer alike, of ``b`` pictures to ``n`` texts and of the first ``b`` back."""
    own, target = logits[:, : len(logits)], truth.float()
    forth = target / target.sum(1, keepdim=True) * logits.log_softmax(1)
    target = target[:, : len(logits)]
    back = target / target.sum(0, keepdim=True) * own.log_softmax(0)
    return -(forth.sum(1).mean() + back.sum(0).mean()) / 2


def kept(shape: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Indices ``[b, n]`` of patches, those of objects first and then any."""
    return (torch.rand(shape.shape, generator=generator) + (shape != NOTHING)).topk(n, 1).indices


def caption_of(scene: Scene, rng: np.random.Generator) -> str:
    """A caption to train on."""
    while held_out(text := caption(scene, rng, detail=0.5)):
        pass
    return text


def write(clip: CLIPModel, folder: Path, vocab_size: int) -> None:
    """Both formats of the model, in half precision, with its tokenizer."""
    clip.half().save_pretrained(folder)
    save_tokenizer(folder)
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    save_file(to_open_clip(clip), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(vocab_size), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain/clip"))
    parser.add_argument("--init", type=Path, help="folder of a pocket-clip to begin with, instead of random weights")
    parser.add_argument("--scenes", type=int, default=64_000)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--texts-from", type=int, default=800, help="step up to which patches alone are taught")
    parser.add_argument("--full-from", type=int, default=4100, help="step up to which bare patches are left out")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    clip = CLIPModel.from_pretrained(args.init) if args.init else build(len(tokenizer), tokenizer.eos_token_id)
    model = WithHeads(clip.float())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    scenes = Scenes(args.out, args.scenes)

    relations, shapes = (
        torch.tensor(tokenizer.convert_tokens_to_ids([f"{w}</w>" for w in words])) for words in (SIDES, SHAPES)
    )

    def loss_at(step: int) -> dict[str, Tensor]:
        draw, generator = np.random.default_rng([42, step]), torch.Generator().manual_seed(step)
        rows = scenes.draw(args.batch, draw)
        drawn = scenes.pictures[rows]
        pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
        pixels = pixels + 0.02 * torch.randn(pixels.shape, generator=generator)
        seen = patches([scenes.scenes[i] for i in rows], drawn)
        texts_too, full = step >= args.texts_from, step >= args.full_from
        few = SIDE**2 if full else int(draw.integers(FEW, SIDE**2 + 1)) if texts_too else FEW
        index = kept(seen.shape, few, generator)
        states = model.see((pixels - mean) / std, index)
        seen = seen.of(index)
        losses = model.patch_losses(states, seen)
        loss = 2 * losses["mask"] + 3 * losses["place"] + losses["shape"] + losses["color"] / 2
        if texts_too:
            described = [scenes.scenes[i] for i in rows]
            others, false = zip(*(wrong(scene, draw) for scene in described), strict=True)
            texts = [caption_of(scene, draw) for scene in described]
            ids = tokenizer([*texts, *false], padding=True, return_tensors="pt").input_ids
            truth = torch.cat([scenes.truth(rows, texts), scenes.fits(rows, others)], 1)
            image, text, words = model.features(states[-1], ids)
            logits = model.clip.logit_scale.exp() * image @ text.T
            losses["contrast"] = contrast(logits, truth)
            losses["accuracy"] = truth.gather(1, logits.argmax(1, keepdim=True)).float().mean()
            own = ids[: len(rows)]
            sizes_said, grounds_said = (torch.tensor(column) for column in zip(*map(said, texts), strict=True))
            beside, sizes = (torch.stack(values) for values in zip(*map(facts, described), strict=True))
            seen_states, told_states = (image, states[-2][:, 1:]), (text[: len(rows)], words[: len(rows)])
            both = (seen_states, told_states, seen.own)
            told = model.sides(*both, side_heard(own, relations, shapes), beside, torch.ones_like(sizes_said))
            losses |= {f"{name}_sides": value for name, value in told.items()}
            told_sizes = model.sizes(*both, size_heard(own, shapes), sizes, sizes_said)
            losses |= {f"{name}_sizes": value for name, value in told_sizes.items()}
            grounds = torch.tensor([GROUNDS.index((s.tone, s.texture)) for s in described])
            bare = seen.shape == NOTHING
            losses["ground"] = model.ground_loss(
                image, text[: len(rows)], states[-2][:, 1:], bare, grounds, grounds_said
            )
            loss = loss / 4 + losses["contrast"] + (sum(told.values()) + sum(told_sizes.values())) / 2
            loss = loss + 2 * losses["ground"]
        return {"loss": loss, **losses}

    def probe(averaged: nn.Module, step: int) -> None:
        preprocess = Preprocess(Framing(size=SIZE, crop=SIZE), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        encoder = TransformersClip(copy.deepcopy(averaged).clip, tokenizer, preprocess)
        rows = {row["what"]: round(row["value"], 3) for row in audit(encoder, n=60, seed=501)}
        print(f"step {step}: {json.dumps(rows)}", flush=True)

    options = {"warmup": 100, "ema": 0.998, "save_every": 250, "probe": probe}
    averaged = fit(model, loss_at, steps=args.steps, lr=args.lr, folder=args.out, **options)
    write(averaged.clip, args.out / "model", len(tokenizer))


if __name__ == "__main__":
    main()
