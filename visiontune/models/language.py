"""`LanguageModel`: a transformers model that reads pictures and text, and writes text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from visiontune.models.base import Model, freeze, split
from visiontune.models.sources import pretrained


class LanguageModel(Model):
    """A family of one transformers class: the roles `language`, `vision` and `projector`, and as `head` the rest.

    Attributes:
        architectures: the transformers classes that the family understands.
        ROLES: role -> the networks that belong to it, where the model has them.
        module: the whole. processor: what makes its inputs of texts and pictures.
    """

    task = "image-text-to-text"
    architectures: ClassVar[tuple[str, ...]]
    ROLES: ClassVar[Mapping[str, tuple[str, ...]]]

    def __init__(self, module: Any, processor: Any, source: str = "") -> None:
        self.module, self.processor = module, processor
        self.source = source or str(module.config.name_or_path) or type(module).__name__
        self._networks = split(module.model, module)
        freeze([module])

    @classmethod
    def open(
        cls, name: str, place: str, source: str, dtype: torch.dtype, index: Mapping[str, Any], **fetching: Any
    ) -> Self:
        """The model of the class `name` at `place`, a folder or a Hub id; `fetching` as transformers has it."""
        import transformers

        reading = {"dtype": dtype, "use_safetensors": True, "variant": fetching.pop("variant", None)}
        module = pretrained(getattr(transformers, name), place, **reading, **fetching)
        return cls(module, transformers.AutoProcessor.from_pretrained(place, **fetching), source)

    def networks(self) -> dict[str, nn.Module]:
        return dict(self._networks)

    def roles(self) -> dict[str, tuple[str, ...]]:
        found = {role: tuple(name for name in names if name in self._networks) for role, names in self.ROLES.items()}
        placed = {name for names in found.values() for name in names}
        return {**found, "head": tuple(name for name in self._networks if name not in placed)}

    def save(self, folder: Path) -> None:
        self.module.save_pretrained(folder, safe_serialization=True)
        self.processor.save_pretrained(folder)

    def encode(self, texts: Sequence[str], images: Sequence[Any] | None = None) -> dict[str, Tensor]:
        """What `logits` reads, of texts that hold the family's mark where a picture stands; padded to the longest.

        Args:
            images: what the processor takes: PIL pictures, for instance, in the order of the marks.
        """
        found = self.processor(text=list(texts), images=images, padding=True, return_tensors="pt")
        return dict(found.to(self.device))

    def logits(self, **inputs: Tensor) -> Tensor:
        """Logits [b, n, v], float32, of the token after each; inputs are those of `encode`, or their embeddings."""
        with self.autocast():
            return self.module(**inputs, use_cache=False).logits.float()
