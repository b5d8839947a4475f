"""CLIP (Radford et al., 2021, arXiv 2103.00020), from transformers or open_clip weights.

`ClipEncoder` is a pair of frozen feature maps, differentiable in the pixels, as rewards use them; `Clip` is the family,
whose networks can be trained. Preprocessing is what the model was trained with, done on tensors: antialiased bicubic
resize, centre crop, normalisation.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.models import pocket
from visiontune.models.base import Presets, dtype_of, require, split
from visiontune.models.contrastive import ContrastiveModel, Features
from visiontune.models.sources import pretrained, weights_of
from visiontune.models.words import Reader
from visiontune.ops.pixels import Fit, Framing, Preprocess

_log = logging.getLogger(__name__)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CONFIG, OPEN_CONFIG = "config.json", "open_clip_config.json"
OPEN_WEIGHTS = "open_clip_model.safetensors"
# Of the paper, section 2.5.
LARGEST_SCALE = 100.0
# What of an open_clip folder is neither its weights nor those of another format.
_OPEN_FILES = (OPEN_CONFIG, "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


class ClipEncoder(nn.Module, ABC):
    """Image and text features of unit length in one space; frozen, in evaluation mode, float32."""

    def __init__(self, model: nn.Module, tokenizer: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.model: Any = model.float().eval().requires_grad_(False)
        self.tokenizer, self.preprocess = tokenizer, preprocess

    @property
    def mean(self) -> Tensor:
        """The mean that images are normalised with, on the encoder's device."""
        return self.preprocess.mean

    def image_features(self, images: Tensor) -> Tensor:
        """Unit features ``[b, d]`` of images ``[b, 3, h, w]`` in [0, 1]; gradients reach the pixels."""
        self.to(images.device)
        return F.normalize(self._images(self.preprocess(images)), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit features ``[b, d]`` of texts; what exceeds the text encoder's length is cut, with a warning."""
        return F.normalize(self._texts(list(prompts)), dim=-1)

    @abstractmethod
    def patches(self, images: Tensor) -> Features:
        """Features of images and of their patches, row by row, not brought to unit length."""

    @abstractmethod
    def words(self, prompts: Sequence[str]) -> Features:
        """Features of texts and of their tokens, not brought to unit length; with a graph."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the format that it was opened from into a new folder."""

    @abstractmethod
    def _images(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _texts(self, prompts: list[str]) -> Tensor: ...


class TransformersClip(ClipEncoder):
    """A ``CLIPModel`` folder or Hub id with its tokenizer."""

    def patches(self, images: Tensor) -> Features:
        found = self.model.get_image_features(pixel_values=self.preprocess(images).to(dtype_of(self.model)))
        normed = self.model.vision_model.post_layernorm(found.last_hidden_state[:, 1:])
        return Features(pooled=found.pooler_output, dense=self.model.visual_projection(normed))

    def words(self, prompts: Sequence[str]) -> Features:
        tokens, found = self._read(list(prompts))
        dense = self.model.text_projection(found.last_hidden_state)
        return Features(pooled=found.pooler_output, dense=dense, mask=tokens["attention_mask"].bool())

    def save(self, folder: Path) -> None:
        from transformers import CLIPImageProcessor

        size, preprocess = self.model.config.vision_config.image_size, self.preprocess
        mean, std = preprocess.mean.flatten().tolist(), preprocess.std.flatten().tolist()
        shown = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size, image_mean=mean, image_std=std)
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
        shown.save_pretrained(folder)

    def _images(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def _texts(self, prompts: list[str]) -> Tensor:
        cut = sum(len(ids) > self.length for ids in self.tokenizer(prompts)["input_ids"])
        if cut:
            _log.warning("%d of %d prompts exceed CLIP's %d tokens and are cut", cut, len(prompts), self.length)
        return self._read(prompts)[1].pooler_output

    @property
    def length(self) -> int:
        """Tokens that a text may have, the marks of its ends included."""
        return int(self.model.config.text_config.max_position_embeddings)

    def _read(self, prompts: list[str]) -> tuple[Any, Any]:
        """The tokens of texts, cut to the length, and what the text tower gives for them."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        tokens = tokens.to(self.mean.device)
        return tokens, self.model.get_text_features(**tokens)


class OpenClip(ClipEncoder):
    """Any open_clip model; of those that are no CLIP in the narrow sense, pooled features alone.

    Attributes:
        folder: where it was opened, if that was a folder.
    """

    folder: Path | None = None

    def patches(self, images: Tensor) -> Features:
        visual = self.model.visual
        before, visual.output_tokens = visual.output_tokens, True
        try:
            pooled, tokens = visual(self.preprocess(images).to(dtype_of(self.model)))
        finally:
            visual.output_tokens = before
        return Features(pooled=pooled, dense=tokens if visual.proj is None else tokens @ visual.proj)

    def words(self, prompts: Sequence[str]) -> Features:
        seen: list[Tensor] = []
        hook = self.model.ln_final.register_forward_hook(lambda module, inputs, output: seen.append(output))
        tokens = self.tokenizer(list(prompts)).to(self.mean.device)
        try:
            pooled = self.model.encode_text(tokens)
        finally:
            hook.remove()
        project = self.model.text_projection
        dense = project(seen[0]) if isinstance(project, nn.Module) else seen[0] @ project
        # The mark of the end is the largest number, whatever fills up the rest.
        mask = torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(1, keepdim=True)
        return Features(pooled=pooled, dense=dense, mask=mask)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        assert self.folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        for file in (file for pattern in _OPEN_FILES for file in self.folder.glob(pattern)):
            shutil.copyfile(file, folder / file.name)
        tensors = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        save_file(tensors, folder / OPEN_WEIGHTS)

    def _images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _texts(self, prompts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(prompts).to(self.mean.device))


def load_clip(
    source: str, backend: str = "auto", revision: str | None = None, tokenizer: str | None = None
) -> ClipEncoder:
    """Load a CLIP.

    Args:
        source: ``pocket/clip``, a local folder, a Hub id of a transformers CLIP (``openai/clip-vit-large-patch14``),
            ``hf-hub:<id>`` for open_clip weights on the Hub, or ``<architecture>/<pretrained tag>`` of open_clip with
            ``backend="open_clip"``.
        backend: ``transformers``, ``open_clip``, or ``auto``: open_clip for ``hf-hub:`` and for folders that hold an
            ``open_clip_config.json`` and no ``config.json``, else transformers.
        revision: branch, tag or commit of a transformers Hub id.
        tokenizer: where a transformers CLIP without a tokenizer of its own borrows one.

    Raises:
        UserError: the weights cannot be found or are not a CLIP.
    """
    folder = pocket.folder(source, CONFIG) if source.startswith(pocket.PREFIX) else Path(source).expanduser()
    if backend == "auto":
        only_open = (folder / OPEN_CONFIG).is_file() and not (folder / CONFIG).is_file()
        backend = "open_clip" if only_open or source.startswith("hf-hub:") else "transformers"
    name = str(folder) if folder.is_dir() else source
    with weights_of(f"CLIP '{source}'", backend, name, revision=revision):
        return _load_open_clip(name) if backend == "open_clip" else _load_transformers(name, revision, tokenizer)


def _load_transformers(
    name: str, revision: str | None, tokenizer: str | None = None, **fetching: Any
) -> TransformersClip:
    from transformers import AutoTokenizer, CLIPModel

    fetching["revision"] = revision or "main"
    model: Any = pretrained(CLIPModel, name, variant=fetching.pop("variant", None), **fetching)
    own = tokenizer is None or (Path(name) / "tokenizer_config.json").is_file()
    words = AutoTokenizer.from_pretrained(name, **fetching) if own else AutoTokenizer.from_pretrained(tokenizer)
    config_file = Path(name) / "preprocessor_config.json"
    settings = json.loads(config_file.read_text()) if config_file.is_file() else {}
    size = model.config.vision_config.image_size
    framing = Framing(size=size, crop=size)
    preprocess = Preprocess(framing, settings.get("image_mean", MEAN), settings.get("image_std", STD))
    return TransformersClip(model, words, preprocess)


def _load_open_clip(name: str) -> OpenClip:
    import open_clip

    folder = Path(name)
    if folder.is_dir():
        name, tag = f"local-dir:{name}", None
    elif name.startswith("hf-hub:"):
        tag = None
    else:
        name, _, tag = name.partition("/")
        if not tag:
            raise ValueError(f"open_clip needs <architecture>/<pretrained tag>, for instance {name}/openai")
    model = open_clip.create_model(name, pretrained=tag, require_pretrained=True)
    encoder = OpenClip(model, open_clip.get_tokenizer(name), open_clip_preprocess(model))
    encoder.folder = folder if folder.is_dir() else None
    return encoder


def open_clip_preprocess(model: Any, fit: Fit | None = None) -> Preprocess:
    """What an open_clip model was trained with, or another ``fit``."""
    settings = model.visual.preprocess_cfg
    size = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
    fit = fit or settings.get("resize_mode", "shortest")
    if fit not in get_args(Fit):
        raise ValueError(f"its preprocessing resizes by '{fit}', which is not supported")
    framing = Framing(size=size, crop=size, fit=fit, rounds_half_crops=True)
    return Preprocess(framing, settings["mean"], settings["std"])


_ATTENTION = ("q_proj", "k_proj", "v_proj", "in_proj", "out_proj")
_FEED_FORWARD = ("mlp.fc1", "mlp.fc2", "mlp.c_fc", "mlp.c_proj")


class Clip(ContrastiveModel):
    """`CLIPModel` of transformers, or a folder of open_clip; networks are called as the format calls them.

    Attributes:
        encoder: the two towers with their tokenizer and preprocessing.
    """

    family = "clip"
    architectures: ClassVar[tuple[str, ...]] = ("CLIPModel", "open_clip")
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "vision": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, *_FEED_FORWARD),
            "all": ("Linear", "Conv2d", "in_proj"),
        },
        "text": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, *_FEED_FORWARD),
            "all": ("Linear", "in_proj"),
        },
    }

    def __init__(self, encoder: ClipEncoder, source: str = "") -> None:
        self.encoder, self.source = encoder, source or type(encoder.model).__name__
        # Tells of captions that are cut; the tokenizers of open_clip do not say how long a text was.
        self.reader = Reader(encoder.tokenizer, encoder.length) if isinstance(encoder, TransformersClip) else None
        self._networks, self.root = split(encoder.model), encoder.model
        towers = {"vision": {"vision_model", "visual"}, "text": {"text_model", "transformer"}}
        self._roles = {role: tuple(n for n in self._networks if n in names) for role, names in towers.items()}
        placed = {name for names in self._roles.values() for name in names}
        self._roles["head"] = tuple(name for name in self._networks if name not in placed)
        whole = all(self._roles.values()) and "logit_scale" in self._networks
        if isinstance(encoder, OpenClip):
            whole &= getattr(encoder.model.visual, "pool_type", "") == "tok" and "text_projection" in self._networks
        require(whole, self.source, f"its {type(encoder.model).__name__} is no CLIP of two transformers")

    @classmethod
    def open(
        cls, name: str, place: str, source: str, dtype: torch.dtype, index: Mapping[str, Any], **fetching: Any
    ) -> Self:
        """The CLIP at `place`, a folder or a Hub id, of transformers or, where `name` says so, of open_clip."""
        encoder: ClipEncoder
        if name == "open_clip":
            if fetching.pop("variant", None):
                require(False, source, "the layout of open_clip has no variants: set variant to null")
            if not Path(place).is_dir():
                from huggingface_hub import snapshot_download

                place = snapshot_download(place, allow_patterns=[*_OPEN_FILES, OPEN_WEIGHTS], **fetching)
            encoder = _load_open_clip(place)
        else:
            encoder = _load_transformers(place, fetching.pop("revision", None), use_safetensors=True, **fetching)
        encoder.model.to(dtype)
        return cls(encoder, source)

    def networks(self) -> dict[str, nn.Module]:
        return dict(self._networks)

    def roles(self) -> dict[str, tuple[str, ...]]:
        return dict(self._roles)

    def save(self, folder: Path) -> None:
        self.encoder.save(folder)

    def image_features(self, images: Tensor) -> Features:
        self.encoder.preprocess.to(images.device)
        with self.autocast():
            return self.encoder.patches(images)

    def text_features(self, prompts: Sequence[str]) -> Features:
        self.encoder.preprocess.to(self.device)
        with self.autocast():
            return self.encoder.words(prompts)

    @property
    def resolution(self) -> int:
        return self.encoder.preprocess.framing.crop

    @property
    def logit_scale(self) -> Tensor:
        return self.encoder.model.logit_scale.exp().reshape(())

    @torch.no_grad()
    def clamp(self) -> None:
        self.encoder.model.logit_scale.clamp_(max=math.log(LARGEST_SCALE))
