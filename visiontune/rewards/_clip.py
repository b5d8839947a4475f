"""CLIP as a pair of feature maps, from transformers or open_clip weights, differentiable in the pixels.

Preprocessing is what the model was trained with, done on tensors: resize of the shorter side (bicubic, antialiased),
centre crop, normalisation.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.errors import UserError

_log = logging.getLogger(__name__)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_POCKET = {"pocket/clip": "pocket-clip"}


class ClipEncoder(nn.Module, ABC):
    """Image and text features of unit length in one space; frozen, in evaluation mode, float32."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        squash: bool = False,
    ) -> None:
        super().__init__()
        self.model: Any = model.float().eval().requires_grad_(False)
        self.tokenizer, self.image_size, self.squash = tokenizer, image_size, squash
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def preprocess(self, images: Tensor) -> Tensor:
        """``[b, 3, h, w]`` in [0, 1] -> normalised ``[b, 3, image_size, image_size]``."""
        size = self.image_size
        height, width = images.shape[-2:]
        if (height, width) != (size, size):
            short = min(height, width)
            # Rounded down, as the reference preprocessing does.
            target = (size, size) if self.squash else (size * height // short, size * width // short)
            images = F.interpolate(images.float(), target, mode="bicubic", antialias=True, align_corners=False)
            top, left = (self._crop_offset(side - size) for side in target)
            images = images[..., top : top + size, left : left + size]
        return (images.float() - self.mean) / self.std

    def image_features(self, images: Tensor) -> Tensor:
        """Unit features ``[b, d]`` of images ``[b, 3, h, w]`` in [0, 1]; gradients reach the pixels."""
        self.to(images.device)
        return F.normalize(self._images(self.preprocess(images)), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit features ``[b, d]`` of texts; what exceeds the text encoder's length is cut, with a warning."""
        return F.normalize(self._texts(list(prompts)), dim=-1)

    def _crop_offset(self, excess: int) -> int:
        return excess // 2

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

    def _crop_offset(self, excess: int) -> int:
        # torchvision's centre crop, which open_clip uses, rounds where transformers' rounds down.
        return round(excess / 2)

    def _images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _texts(self, prompts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(prompts).to(self.mean.device))


def load_clip(source: str, backend: str = "auto", revision: str | None = None) -> ClipEncoder:
    """Load a CLIP.

    Args:
        source: ``pocket/clip``, a local folder, a Hub id of a transformers CLIP (``openai/clip-vit-large-patch14``),
            ``hf-hub:<id>`` for open_clip weights on the Hub, or ``<architecture>/<pretrained tag>`` of open_clip with
            ``backend="open_clip"``.
        backend: ``transformers``, ``open_clip``, or ``auto``: open_clip for ``hf-hub:`` and for folders that hold an
            ``open_clip_config.json`` and no ``config.json``, else transformers.
        revision: branch, tag or commit of a transformers Hub id.

    Raises:
        UserError: the weights cannot be found or are not a CLIP.
    """
    folder = _pocket(source) if source in _POCKET else Path(source).expanduser()
    if backend == "auto":
        only_open = (folder / "open_clip_config.json").is_file() and not (folder / "config.json").is_file()
        backend = "open_clip" if only_open or source.startswith("hf-hub:") else "transformers"
    name = str(folder) if folder.is_dir() else source
    try:
        return _load_open_clip(name) if backend == "open_clip" else _load_transformers(name, revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        mend = "" if folder.is_dir() else f": give a local folder, or fetch it with `hf download {source}`"
        raise UserError(f"CLIP '{source}' cannot be loaded by {backend} ({reason}){mend}") from error


def _pocket(source: str) -> Path:
    folder = Path(str(resources.files("visiontune") / "assets" / _POCKET[source]))
    if not folder.is_dir():
        raise UserError(f"{source} is not in this installation: install visiontune from its wheel or a full checkout")
    return folder


def _load_transformers(name: str, revision: str | None) -> ClipEncoder:
    from transformers import AutoTokenizer, CLIPModel

    model: Any = CLIPModel.from_pretrained(name, revision=revision or "main")
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main")
    config_file = Path(name) / "preprocessor_config.json"
    settings = json.loads(config_file.read_text()) if config_file.is_file() else {}
    size = model.config.vision_config.image_size
    return TransformersClip(model, tokenizer, size, settings.get("image_mean", _MEAN), settings.get("image_std", _STD))


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
    settings = model.visual.preprocess_cfg
    size = settings["size"]
    mode = settings.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise ValueError(f"its preprocessing resizes by '{mode}', which is not supported")
    return OpenClip(
        model,
        open_clip.get_tokenizer(name),
        size if isinstance(size, int) else size[0],
        settings["mean"],
        settings["std"],
        squash=mode == "squash",
    )
