"""Samples as the trainer sees them: latents and conditions, encoded once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from visiontune.core import Batch, Condition, Encoders
from visiontune.data import buckets, transforms
from visiontune.data.base import Config, Sample
from visiontune.data.buckets import Size
from visiontune.data.cache import Cache, Tensors, key
from visiontune.errors import UserError

T = TypeVar("T")
DEFAULT_CACHE = Path("runs/.cache")


@dataclass(frozen=True, kw_only=True)
class Pick:
    """One row of a batch before it is encoded: which sample, at which size, and its random choices."""

    index: int
    size: Size
    flip: bool = False
    drop: bool = False
    seed: int = 0


class Rows:
    """Encodes samples, with a cache between the encoders and the disk.

    Latents are kept as moments of the VAE posterior (so each visit draws its own latent) under the image's content, the
    transform and the VAE's fingerprint; conditions under the caption and the text encoders' fingerprint. An entry
    is always encoded alone: its value is a function of its key, whatever else a run encodes and wherever a killed run
    stopped. Captions are dropped after the cache.

    Args:
        model: its ``moments``, ``latents_from_moments``, ``embed``, ``unconditional`` and ``fingerprint`` are used.
        samples: instance samples and, for prior preservation, samples with ``prior=True``.
        config: resolution, buckets, crop, flip, cache.
        cache_dir: where the caches lie; runs may share it.
        train_text: the text encoder changes during training, so conditions are left to the objective (``Batch.cond`` is
            ``None``).

    Attributes:
        samples: as given.
        buckets: indices of the instance samples under each bucket size (height, width).
        prior: indices of the prior samples; they take the size of the batch that they join.
        partners: the index of a pair's worse image under that of its better one, whose size and flip it takes.

    Raises:
        UserError: no instance sample, an unreadable image, or a resolution that the model cannot take.
    """

    def __init__(
        self,
        model: Encoders,
        samples: Sequence[Sample],
        config: Config,
        cache_dir: Path | str = DEFAULT_CACHE,
        train_text: bool = False,
    ) -> None:
        self.model, self.samples, self.config, self.train_text = model, list(samples), config, train_text
        self.prior = [i for i, s in enumerate(self.samples) if s.prior]
        worse = {i: partner for i, s in enumerate(self.samples) if (partner := s.partner()) is not None}
        self.partners = dict(zip(worse, range(len(self.samples), len(self.samples) + len(worse)), strict=True))
        self._latents = Cache(Path(cache_dir) / "latents")
        self._text = Cache(Path(cache_dir) / "text")
        self._vae, self._encoder = model.fingerprint("vae"), model.fingerprint("text")
        self._digests: dict[int, str] = {}
        resolution = config.resolution or model.resolution
        sizes = buckets.sizes(resolution, model.downsample, model.unit, square=not config.buckets)
        self.buckets: dict[Size, list[int]] = {}
        for i, sample in enumerate(self.samples):
            if not sample.prior:
                size = buckets.nearest(_reading(sample, sample.size), sizes) if len(sizes) > 1 else sizes[0]
                self.buckets.setdefault(size, []).append(i)
        self.samples += worse.values()
        if not self.buckets:
            raise UserError("the dataset has no images to train on: put images into data.root")

    def __len__(self) -> int:
        """Number of instance samples."""
        return len(self.samples) - len(self.prior) - len(self.partners)

    def fill(self, rank: int = 0, world: int = 1) -> None:
        """Encode what training will need, this rank's share of it, behind a progress bar.

        Optional: whatever is missing is encoded when it is first drawn, as prior images always are.
        """
        flips = (False, True) if self.config.flip else (False,)
        latents = [(i, size, flip) for size, group in self.buckets.items() for i in group for flip in flips]
        latents += [(self.partners[i], size, flip) for i, size, flip in latents if i in self.partners]
        captions = list(dict.fromkeys(s.caption for s in self.samples))
        if self.config.cache:
            for i, size, flip in _progress(latents[rank::world], "encoding images"):
                self.moments(Pick(index=i, size=size, flip=flip))
        if not self.train_text:
            for caption in _progress(captions[rank::world], "encoding captions"):
                self.condition(caption)

    def moments(self, pick: Pick) -> Tensor:
        """Moments ``[2c, h, w]`` of a row's VAE posterior, on the CPU."""
        if not self.config.cache:
            return self._encode(pick)["moments"]
        entry = key(
            image=self._digest(pick.index),
            size=pick.size,
            flip=pick.flip,
            transform=transforms.RECIPE,
            vae=self._vae,
        )
        return self._latents.get(entry, lambda: self._encode(pick))["moments"]

    def condition(self, caption: str) -> Condition:
        """The condition of one caption, length 1, on the CPU."""
        stored = self._text.get(key(caption=caption, encoder=self._encoder), lambda: _flat(self._embed(caption)))
        extra = {name.removeprefix("extra."): t for name, t in stored.items() if name.startswith("extra.")}
        return Condition(tokens=stored["tokens"], mask=stored.get("mask"), pooled=stored.get("pooled"), extra=extra)

    def collate(self, picks: Sequence[Pick]) -> Batch:
        """The batch of some picks of one size, in their order, on the CPU.

        A row with ``drop`` has the empty caption as its prompt and the model's unconditional condition. Of pairs
        ``image`` are the better images and ``rejected`` the worse ones.
        """
        samples = [self.samples[p.index] for p in picks]
        data = {"image": self._latents_of(picks)}
        if all(p.index in self.partners for p in picks):
            data["rejected"] = self._latents_of([replace(p, index=self.partners[p.index]) for p in picks])
        cond = None
        if not self.train_text:
            rows = [self._empty if p.drop else self.condition(s.caption) for p, s in zip(picks, samples, strict=True)]
            cond = Condition.cat(rows)
        return Batch(
            prompts=["" if p.drop else s.caption for p, s in zip(picks, samples, strict=True)],
            data=data,
            cond=cond,
            weight=torch.tensor([s.weight for s in samples], dtype=torch.float32),
            prior=torch.tensor([s.prior for s in samples], dtype=torch.bool),
            ids=[s.id for s in samples],
        )

    def _latents_of(self, picks: Sequence[Pick]) -> Tensor:
        moments = torch.stack([self.moments(p) for p in picks])
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        eps = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(p.seed)) for p in picks])
        return self.model.latents_from_moments(moments, eps.to(moments))

    @cached_property
    def _empty(self) -> Condition:
        with torch.no_grad():
            return self.model.unconditional(1).to("cpu")

    def _digest(self, index: int) -> str:
        if index not in self._digests:
            sample = self.samples[index]
            self._digests[index] = _reading(sample, sample.digest)
        return self._digests[index]

    def _encode(self, pick: Pick) -> Tensors:
        sample = self.samples[pick.index]
        centering = (0.5, 0.5)
        if self.config.crop == "random":
            x, y = torch.rand(2, generator=torch.Generator().manual_seed(pick.seed)).tolist()
            centering = (x, y)
        pixels = transforms.to_pixels(_reading(sample, sample.open), pick.size, flip=pick.flip, centering=centering)
        with torch.no_grad():
            moments = self.model.moments(pixels[None])[0].cpu()
        if not moments.isfinite().all():
            raise UserError(f"the VAE gives no finite latent for {sample.id}: load the model with dtype float32")
        if self.config.cache and isinstance(sample.image, Path) and sample.digest() != self._digest(pick.index):
            raise UserError(f"{sample.id} changed while it was being read: start again")
        return {"moments": moments}

    def _embed(self, caption: str) -> Condition:
        with torch.no_grad():
            return self.model.embed([caption])


def _reading(sample: Sample, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # a damaged file can raise nearly anything from inside a decoder
        raise UserError(f"cannot read image {sample.id}: {' '.join(str(error).split())}") from error


def _flat(cond: Condition) -> Tensors:
    named = {"tokens": cond.tokens, "mask": cond.mask, "pooled": cond.pooled}
    named |= {f"extra.{name}": t for name, t in cond.extra.items()}
    return {name: t for name, t in named.items() if t is not None}


def _progress(items: Sequence[T], what: str) -> Iterable[T]:
    return tqdm(items, what, delay=1, leave=False)
