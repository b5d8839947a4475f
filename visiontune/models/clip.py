"""CLIP as a pair of feature maps, from transformers or open_clip weights, differentiable in the pixels.

Preprocessing is what the model was trained with, done on tensors: antialiased bicubic resize, centre crop,
normalisation.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.models import pocket
from visiontune.models.sources import weights_of
from visiontune.ops.pixels import Fit, Framing, Preprocess

_log = logging.getLogger(__name__)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CONFIG = "config.json"


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
    def _images(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _texts(self, prompts: list[str]) -> Tensor: ...


class TransformersClip(ClipEncoder):
    """A ``CLIPModel`` folder or Hub id with its tokenizer."""

    def _images(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def _texts(self, prompts: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        cut = sum(len(ids) > length for ids in self.tokenizer(prompts)["input_ids"])
        if cut:
            _log.warning("%d of %d prompts exceed CLIP's %d tokens and are cut", cut, len(prompts), length)
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.mean.device)).pooler_output


class OpenClip(ClipEncoder):
    """Any open_clip model."""

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
        only_open = (folder / "open_clip_config.json").is_file() and not (folder / CONFIG).is_file()
        backend = "open_clip" if only_open or source.startswith("hf-hub:") else "transformers"
    name = str(folder) if folder.is_dir() else source
    with weights_of(f"CLIP '{source}'", backend, source, revision=revision):
        return _load_open_clip(name) if backend == "open_clip" else _load_transformers(name, revision, tokenizer)


def _load_transformers(name: str, revision: str | None, tokenizer: str | None) -> ClipEncoder:
    from transformers import AutoTokenizer, CLIPModel

    model: Any = CLIPModel.from_pretrained(name, revision=revision or "main")
    own = tokenizer is None or (Path(name) / "tokenizer_config.json").is_file()
    words = (
        AutoTokenizer.from_pretrained(name, revision=revision or "main")
        if own
        else AutoTokenizer.from_pretrained(tokenizer)
    )
    config_file = Path(name) / "preprocessor_config.json"
    settings = json.loads(config_file.read_text()) if config_file.is_file() else {}
    size = model.config.vision_config.image_size
    framing = Framing(size=size, crop=size)
    preprocess = Preprocess(framing, settings.get("image_mean", MEAN), settings.get("image_std", STD))
    return TransformersClip(model, words, preprocess)


def _load_open_clip(name: str) -> ClipEncoder:
    import open_clip

    if Path(name).is_dir():
        name, tag = f"local-dir:{name}", None
    elif name.startswith("hf-hub:"):
        tag = None
    else:
        name, _, tag = name.partition("/")
        if not tag:
            raise ValueError(f"open_clip needs <architecture>/<pretrained tag>, for instance {name}/openai")
    model = open_clip.create_model(name, pretrained=tag, require_pretrained=True)
    return OpenClip(model, open_clip.get_tokenizer(name), open_clip_preprocess(model))


def open_clip_preprocess(model: Any, fit: Fit | None = None) -> Preprocess:
    """What an open_clip model was trained with, or another ``fit``."""
    settings = model.visual.preprocess_cfg
    size = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
    fit = fit or settings.get("resize_mode", "shortest")
    if fit not in get_args(Fit):
        raise ValueError(f"its preprocessing resizes by '{fit}', which is not supported")
    framing = Framing(size=size, crop=size, fit=fit, rounds_half_crops=True)
    return Preprocess(framing, settings["mean"], settings["std"])
