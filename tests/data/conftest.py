"""A model whose encoders are arithmetic, and small picture files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from visiontune.core import Condition


class FakeModel:
    """Latents are pixels averaged over 2x2 blocks, tokens are letters; counts what it is asked to encode."""

    downsample = unit = 2
    latent_channels = 3
    resolution = 32
    paints = WORDS_SEE = False

    def __init__(self, vae: str = "vae", text: str = "text") -> None:
        self.prints = {"vae": vae, "text": text}
        self.encoded, self.embedded = 0, 0

    def moments(self, pixels: Tensor) -> Tensor:
        self.encoded += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels, 2)
        return torch.cat([mean, torch.full_like(mean, 0.25)], 1)

    def latents_from_moments(self, moments: Tensor, eps: Tensor | None = None) -> Tensor:
        mean, std = moments.chunk(2, 1)
        return mean if eps is None else mean + std * eps

    def encode(self, pixels: Tensor, *, generator: object = None, sample: bool = True) -> Tensor:
        return self.latents_from_moments(self.moments(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(latents, scale_factor=2)

    def embed(self, prompts: Sequence[str]) -> Condition:
        self.embedded += len(prompts)
        letters = torch.tensor([[float(ord(c)) for c in p.ljust(48)[:48]] for p in prompts])
        return Condition(tokens=letters[..., None], mask=letters > 32, extra={"length": letters.sum(1)})

    def unconditional(self, count: int) -> Condition:
        zero = torch.zeros(count, 48)
        return Condition(tokens=zero[..., None], mask=zero > 32, extra={"length": zero.sum(1)})

    def fingerprint(self, part: str) -> str:
        return self.prints[part]


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def photo(tmp_path: Path) -> Callable[..., Path]:
    """Writes a picture of random pixels: ``photo("a.png", size=(width, height), caption="a dog", seed=1)``."""

    def write(name: str, size: tuple[int, int] = (32, 32), caption: str | None = None, seed: int | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(sum(name.encode()) if seed is None else seed)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return write
