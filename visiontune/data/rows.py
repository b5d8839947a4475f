"""Samples as the trainer sees them: latents and conditions, encoded once and kept on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from visiontune.core import Batch, Condition, Encoders, Request
from visiontune.data import buckets, segments, transforms
from visiontune.data.base import Config, Sample, Source, listed
from visiontune.data.buckets import Size
from visiontune.data.cache import Cache, Tensors, key
from visiontune.data.mix import WHOLE
from visiontune.data.picks import Pick, reading
from visiontune.data.scores import UNTOLD
from visiontune.data.transforms import Zoom
from visiontune.errors import UserError

T = TypeVar("T")
DEFAULT_CACHE = Path("runs/.cache")
# Of latents and of conditions each, so that what is small is read from the disk once.
_MEMORY = 256 * 2**20


class Rows:
    """Encodes samples, with a cache between the encoders and the disk.

    Latents are kept as moments of the VAE posterior (so each visit draws its own latent) under the picture's content,
    the transform and the VAE's fingerprint; conditions under the caption and the text encoders' fingerprint, in the
    encoders' own number format. An entry is always encoded alone: its value is a function of its key, whatever else a
    run encodes and wherever a killed run stopped. Captions are dropped after the cache.

    Args:
        model: its ``moments``, ``latents_from_moments``, ``embed``, ``unconditional`` and ``fingerprint`` are used, and
            of one that ``paints`` its ``channels``.
        samples: instance samples and, for prior preservation, samples with ``prior=True``.
        config: resolution, buckets, crop, flip, cache.
        cache_dir: where the caches lie; runs may share it.
        train_text: the text encoder changes during training, so conditions are left to the objective (``Batch.cond`` is
            ``None``).

    Attributes:
        samples: as given.
        columns: the kind of source of each column that a batch has.
        buckets: indices of the instance samples under each bucket size (height, width), that of their main column; of
            sets the first sample alone, of whose size all are.
        sets: indices of all samples of a set, by that of its first; empty where there are no sets.
        prior: indices of the prior samples; they take the size of the batch that they join.

    Raises:
        UserError: no instance sample, samples with different columns, an unreadable image, or a resolution that the
            model cannot take.
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
        self.columns = _columns(self.samples)
        if model.paints:
            self.columns.pop("region", None)  # is among the channels
        # Of models that read words beside pictures, a condition is one of both.
        self._sees = model.WORDS_SEE and "source" in self.columns
        self._latents = Cache(Path(cache_dir) / "latents", _MEMORY)
        self._text = Cache(Path(cache_dir) / "text", _MEMORY)
        self._vae, self._encoder = model.fingerprint("vae"), model.fingerprint("text")
        # Every column of a row asks for it, and it may have to look at the row's region.
        self._zoom = lru_cache(maxsize=256)(self._zoom_of)
        self._digests: dict[tuple[int, str], str] = {}
        self._captions: dict[str, str] = {}
        resolution = config.resolution or model.resolution
        sizes = buckets.sizes(resolution, model.downsample, model.unit, square=not config.buckets)
        if config.canvas:
            sizes = [(height, 2 * width) for height, width in sizes]
        main = next(iter(self.columns))
        self.buckets: dict[Size, list[int]] = {}
        self.sets = _sets(self.samples) if config.set_size > 1 else {}
        for i, sample in enumerate(self.samples):
            if not sample.prior and (not self.sets or i in self.sets):
                shape = reading(sample, sample.sources[main].size) if len(sizes) > 1 else sizes[0]
                self.buckets.setdefault(buckets.nearest(shape, sizes), []).append(i)

    def __len__(self) -> int:
        """Number of instance samples."""
        return len(self.samples) - len(self.prior)

    def fill(self, rank: int = 0, world: int = 1) -> None:
        """Encode what training will need, this rank's share of it, behind a progress bar.

        Optional: whatever is missing is encoded when it is first drawn, as prior images always are.
        """
        flips = (False, True) if self.config.flip else (False,)
        picks = [
            (Pick(index=i, size=size, flip=flip), column)
            for column in self.columns
            for size, group in self.buckets.items()
            for first in group
            for i in self.sets.get(first, [first])
            for flip in flips
        ]
        captions = [] if self._sees else list(dict.fromkeys(s.caption for s in self.samples))
        if self.config.cache:
            for pick, column in _progress(picks[rank::world], "encoding images"):
                self._stored(pick, column)
        if self._sees and not self.train_text:
            for pick, column in _progress(picks[rank::world], "encoding captions"):
                if column == "source":
                    self._seeing(pick, self.samples[pick.index].caption)
        if not self.train_text:
            for caption in _progress(captions[rank::world], "encoding captions"):
                self.condition(caption)

    def moments(self, pick: Pick, column: str = "image") -> Tensor:
        """Moments ``[2c, (f), h, w]`` of a row's VAE posterior, on the CPU."""
        return self._stored(pick, column)["moments"]

    def mask(self, pick: Pick, column: str = "mask") -> Tensor:
        """A row's mask ``[1, h, w]`` in [0, 1] at the latents' size; a prior picture without one counts everywhere."""
        if column not in self.samples[pick.index].sources:
            return torch.ones(1, *(side // self.model.downsample for side in pick.size))
        return self._stored(pick, column)["mask"]

    def segments(self, pick: Pick, column: str) -> Tensor:
        """Where a row's nouns are, bits ``int32 [1, h, w]`` at the latents' size; none of a prior picture."""
        if column not in self.samples[pick.index].sources:
            return torch.zeros(1, *(side // self.model.downsample for side in pick.size), dtype=torch.int32)
        return self._stored(pick, column)["segments"]

    def channels(self, pick: Pick) -> Tensor:
        """What a model that paints is shown beside a row's noisy latents, [1, k, h, w]: its region, and what is left.

        A row without a region of its own gets a random one, another at every visit.
        """
        sample = self.samples[pick.index]
        region = self._region(sample, pick)
        # What is hidden is grey, which is 0.
        left = self._pixels(sample, sample.sources["image"], pick) * (1 - region)
        with torch.no_grad():
            moments = self.model.moments(left[None]).cpu()
        return self.model.channels(self.model.latents_from_moments(moments), region[None])

    def _region(self, sample: Sample, pick: Pick) -> Tensor:
        """Where a row is painted, [1, H, W] in pixels, 0 or 1."""
        if "region" not in sample.sources:
            return transforms.random_region(pick.size, torch.Generator().manual_seed(pick.seed))
        region = self._given_region(sample, pick, self._zoom(pick))
        if not self.config.box:
            return region
        if not region.any():
            raise UserError(f"the crop leaves nothing of the region of {sample.id}: set data.crop=center, or mend it")
        return transforms.boxed(region, self.config.box_jitter, torch.Generator().manual_seed(pick.seed + 1))

    def _given_region(self, sample: Sample, pick: Pick, zoom: Zoom | None = None) -> Tensor:
        picture, place = reading(sample, sample.sources["region"].open), pick.centering(self.config)
        return transforms.to_mask(picture, pick.size, 1, flip=pick.flip, centering=place, zoom=zoom).round()

    def _zoom_of(self, pick: Pick) -> Zoom | None:
        """How a row's picture, and its masks, are zoomed at this visit."""
        if not self.config.zoom:
            return None
        sample, rng = self.samples[pick.index], torch.Generator().manual_seed(pick.seed + 2)
        region = self._given_region(sample, pick) if "region" in sample.sources else None
        box = None if region is None or not region.any() else transforms.box_of(region)
        return Zoom.draw(self.config.zoom, pick.size, rng, box)

    def _counts(self, picks: Sequence[Pick], mask: Tensor | None) -> Tensor | None:
        """How much each place of the rows counts, [b, 1, h, w]: nothing where a zoom has left nothing."""
        if not self.config.zoom:
            return mask
        white = Image.new("L", (1, 1), 255)
        shares = [transforms.to_mask(white, p.size, self.model.downsample, zoom=self._zoom(p)) for p in picks]
        whole = (torch.stack(shares) == 1).float()
        return whole if mask is None else mask * whole

    def condition(self, caption: str) -> Condition:
        """The condition of one caption, length 1, on the CPU; not to be changed in place."""
        if caption not in self._captions:
            self._captions[caption] = key(caption=caption, encoder=self._encoder)
        return _condition(self._text.get(self._captions[caption], lambda: _flat(self._embed(caption))))

    def _seeing(self, pick: Pick, caption: str) -> Condition:
        """The condition of a caption beside a row's source, cut as its latents are."""
        sample = self.samples[pick.index]
        source = sample.sources["source"]

        def make() -> Tensors:
            picture = reading(sample, source.open)
            picture = transforms.fitted(picture, pick.size, flip=pick.flip, centering=pick.centering(self.config))
            with torch.no_grad():
                return _flat(self.model.words([Request(prompt=caption, pictures=(picture,))]).to("cpu"))

        if not self.config.cache:
            return _condition(make())
        told = key(
            caption=caption,
            encoder=self._encoder,
            image=self._digest(pick.index, "source"),
            size=pick.size,
            flip=pick.flip,
            transform=transforms.RECIPE,
        )
        return _condition(self._text.get(told, make))

    def collate(self, picks: Sequence[Pick]) -> Batch:
        """The batch of some picks of one size, in their order, on the CPU.

        A row with ``drop``, and a prior row with the empty caption, has the empty caption as its prompt and the model's
        unconditional condition. ``data`` has
        latents [b, c, (f), h, w] of each column of pictures, those of one row from one draw, of ``source`` the mean,
        and masks and bits of segments [b, 1, h, w]; of a model that paints, ``channels`` [b, k, h, w]. Where sources
        are hidden from some rows, ``shown`` [b] is True for the others. ``scores`` [b, k] are what rows are told of
        their ratings, nan for nothing. Rows of sets have ``set``
        [b], its number.
        """
        samples = [self.samples[p.index] for p in picks]
        data = {column: self._column(picks, column, kind) for column, kind in self.columns.items()}
        if (mask := self._counts(picks, data.get("mask"))) is not None:
            data["mask"] = mask
        if self.model.paints:
            data["channels"] = torch.cat([self.channels(p) for p in picks])
        if self.sets:
            data["set"] = torch.tensor([p.set for p in picks])
        if "source" in data and self.config.source_dropout:
            data["shown"] = torch.tensor([not p.hide for p in picks])
        if self.config.scores:
            data["scores"] = torch.stack([self._scores(p, s) for p, s in zip(picks, samples, strict=True)])
        cond = None
        if not self.train_text:
            cond = Condition.cat([self._told(p, s) for p, s in zip(picks, samples, strict=True)])
        return Batch(
            prompts=["" if p.drop else s.caption for p, s in zip(picks, samples, strict=True)],
            data=data,
            cond=cond,
            weight=torch.tensor([s.weight for s in samples], dtype=torch.float32),
            prior=torch.tensor([s.prior for s in samples], dtype=torch.bool),
            ids=[s.id for s in samples],
            timestep_range=self._ranges(samples) if self.config.mix else None,
            nouns=[s.nouns for s in samples] if "segments" in self.columns.values() else None,
        )

    def _ranges(self, samples: Sequence[Sample]) -> Tensor:
        """[b, 2], the noise that each row is trained at; a prior row's is the whole."""
        found = self.config.ranges()
        return torch.tensor([WHOLE if s.prior else found[s.part] for s in samples], dtype=torch.float32)

    def _scores(self, pick: Pick, sample: Sample) -> Tensor:
        """[k], what a row is told of its ratings at this visit; a prior row has none."""
        count, rng = len(self.config.scores), torch.Generator().manual_seed(pick.seed + 3)
        told = torch.tensor(sample.scores or (UNTOLD,) * count, dtype=torch.float32)
        return told.masked_fill(torch.rand(count, generator=rng) < self.config.score_dropout, UNTOLD)

    def _column(self, picks: Sequence[Pick], column: str, kind: str) -> Tensor:
        if kind == "picture":
            return self._latents_of(picks, column)
        read = self.mask if kind == "mask" else self.segments
        return torch.stack([read(p, column) for p in picks])

    def _told(self, pick: Pick, sample: Sample) -> Condition:
        """The condition of one row."""
        unsaid = pick.drop or (sample.prior and not sample.caption)
        if self._sees:
            return self._seeing(pick, "" if unsaid else sample.caption)
        return self._empty if unsaid else self.condition(sample.caption)

    def _latents_of(self, picks: Sequence[Pick], column: str) -> Tensor:
        moments = torch.stack([self.moments(p, column) for p in picks])
        if column == "source":
            return self.model.latents_from_moments(moments)  # as the picture is read where the model draws
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        eps = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(p.seed)) for p in picks])
        return self.model.latents_from_moments(moments, eps.to(moments))

    @cached_property
    def _empty(self) -> Condition:
        with torch.no_grad():
            return self.model.unconditional(1).to("cpu")

    def _stored(self, pick: Pick, column: str) -> Tensors:
        """What a column holds for a row, from the cache if there is one."""
        sample = self.samples[pick.index]
        source = sample.sources[column]
        if not self.config.cache:
            return self._make(sample, source, pick)
        digest = self._digest(pick.index, column)
        of_masks: dict[str, str | int] = {source.kind: self.model.downsample}
        makes: dict[str, str | int] = {"vae": self._vae} if source.kind == "picture" else of_masks
        entry = key(image=digest, size=pick.size, flip=pick.flip, transform=transforms.RECIPE, **makes)

        def make() -> Tensors:
            made = self._make(sample, source, pick)
            if source.file is not None and source.digest() != digest:
                raise UserError(f"{sample.id} changed while it was being read: start again")
            return made

        return self._latents.get(entry, make)

    def _digest(self, index: int, column: str) -> str:
        """Of the content of a row's source."""
        if (index, column) not in self._digests:
            sample = self.samples[index]
            self._digests[index, column] = reading(sample, sample.sources[column].digest)
        return self._digests[index, column]

    def _make(self, sample: Sample, source: Source, pick: Pick) -> Tensors:
        """What becomes of a source: the moments of a picture, or a mask at the latents' size."""
        if source.kind != "picture":
            picture, shrink, place = reading(sample, source.open), self.model.downsample, pick.centering(self.config)
            if source.kind == "segments":
                return {"segments": segments.to_latents(picture, pick.size, shrink, flip=pick.flip, centering=place)}
            zoom = self._zoom(pick)
            return {"mask": transforms.to_mask(picture, pick.size, shrink, flip=pick.flip, centering=place, zoom=zoom)}
        with torch.no_grad():
            moments = self.model.moments(self._pixels(sample, source, pick)[None])[0].cpu()
        if not moments.isfinite().all():
            raise UserError(f"the VAE gives no finite latent for {sample.id}: load the model with dtype float32")
        return {"moments": moments}

    def _pixels(self, sample: Sample, source: Source, pick: Pick) -> Tensor:
        picture, place = reading(sample, source.open), pick.centering(self.config)
        return transforms.to_pixels(picture, pick.size, flip=pick.flip, centering=place, zoom=self._zoom(pick))

    def _embed(self, caption: str) -> Condition:
        with torch.no_grad():
            return self.model.embed([caption])


def _sets(samples: Sequence[Sample]) -> dict[int, list[int]]:
    """Indices of the instance samples of each set, by that of its first."""
    found: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        if not sample.prior:
            found.setdefault(sample.set, []).append(i)
    return {members[0]: members for members in found.values()}


def _columns(samples: Sequence[Sample]) -> dict[str, str]:
    """The columns of the instance samples and their kinds; all must have them, prior ones the pictures alone."""
    first = next((s for s in samples if not s.prior), None)
    if first is None:
        raise UserError("the dataset has no images to train on: put images into data.root")
    columns: dict[str, str] = {name: source.kind for name, source in first.sources.items()}
    for name, kind in columns.items():
        lacking = [s.id for s in samples if name not in s.sources and not (s.prior and kind != "picture")]
        if lacking:
            raise UserError(f"{len(lacking)} samples have no {name}, as others have: {listed(lacking)}")
    return columns


def _condition(stored: Tensors) -> Condition:
    """`_flat` undone."""
    extra = {name.removeprefix("extra."): t for name, t in stored.items() if name.startswith("extra.")}
    return Condition(tokens=stored["tokens"], mask=stored.get("mask"), pooled=stored.get("pooled"), extra=extra)


def _flat(cond: Condition) -> Tensors:
    named = {"tokens": cond.tokens, "mask": cond.mask, "pooled": cond.pooled}
    named |= {f"extra.{name}": t for name, t in cond.extra.items()}
    return {name: t for name, t in named.items() if t is not None}


def _progress(items: Sequence[T], what: str) -> Iterable[T]:
    return tqdm(items, what, delay=1, leave=False)
