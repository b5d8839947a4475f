"""`PipelineModel`: a stock diffusers pipeline seen as named networks, text, and a way to draw."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import CFG, Embedded, Guidance, classifier_free
from visiontune.errors import UserError
from visiontune.models._distilled import few_steps
from visiontune.models._opening import opened
from visiontune.models._rated import TellsScores
from visiontune.models._reading import NOTHING, Reads
from visiontune.models._structure import Structure
from visiontune.models._told import TellsGuidance
from visiontune.models.base import Model, dtype_of, freeze
from visiontune.models.words import Reader, quiet

# Stock pipelines refuse sizes that are no multiple of 8, even where the codec would take them.
_LEAST_UNIT = 8
# Beyond eight times as long sides a picture is not what was meant, and one step may take hours.
_MOST_AREA = 64


class PipelineModel(TellsScores, TellsGuidance, Model):
    """A family of one diffusers pipeline, whose components are its networks.

    Attributes:
        pipeline_classes: the pipeline classes that the family understands.
        load_options: keyword arguments for the pipeline's `from_pretrained`.
        DENOISERS: the components that compute the prediction. CODEC: the one between pixels and what they work on.
        GUIDANCE_OFFSET: what the pipeline's guidance scale lacks to the weight w of u + w (c - u); 1 for pipelines that
            compute c + scale (c - u).
        STRUCTURE: how its pipeline calls its denoiser and what that is made of, for guidance that reaches into it; None
            where no such guidance was verified.
        WORDLESS: the component that predicts rows without words, where it is another than the denoiser.
        pipe: the pipeline.
        downsample: pixels per latent along one side. unit: the sides of a picture are multiples of this.
        resolution: pixels per side the model was made for.
        longest: pixels of the longest side that the denoiser has places for, where their number is fixed.
        reader: knows how much of a prompt is read; longer ones are cut, and named once.
        reads: the pictures that stand beside every prompt, if any.
        WORDS_SEE: whether the text encoder reads those, too.
    """

    task = "text-to-image"
    pipeline_classes: ClassVar[tuple[str, ...]]
    load_options: ClassVar[dict[str, Any]] = {}
    DENOISERS: ClassVar[tuple[str, ...]] = ("unet",)
    CODEC: ClassVar[str] = "vae"
    GUIDANCE_OFFSET: ClassVar[float] = 0.0
    STRUCTURE: ClassVar[Structure | None] = None
    WORDLESS: ClassVar[str | None] = None

    resolution: int
    longest: int | None = None
    reads: Reads = NOTHING
    WORDS_SEE: ClassVar[bool] = False

    def __init__(self, pipe: Any, source: str = "") -> None:
        self.pipe = pipe
        self.source = source or str(pipe.config.get("_name_or_path") or type(pipe).__name__)
        freeze(self.networks().values())
        self.downsample = int(pipe.vae_scale_factor)
        self.unit = max(self.downsample, _LEAST_UNIT)
        # Some have a processor, of pictures too, in its place.
        tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
        self.reader = Reader(tokenizer, int(tokenizer.model_max_length))
        self.distilled = few_steps(self.source, self._few_steps())
        self._float32_codec: Any = None

    @classmethod
    def open(
        cls, name: str, place: str, source: str, dtype: torch.dtype, index: Mapping[str, Any], **fetching: Any
    ) -> Self:
        """The pipeline of the class `name` at `place`, a folder or a Hub id.

        Args:
            index: what its `model_index.json` says. fetching: as diffusers has it.
        """
        return cls(opened(name, place, source, dtype, index, cls.load_options, **fetching), source=source)

    def _few_steps(self) -> str | None:
        """What of the pipeline's configuration says that it was distilled to few steps; None where nothing does."""
        return "is_distilled in its model_index.json" if self.pipe.config.get("is_distilled") else None

    # -- networks -----------------------------------------------------------------------------------------------

    def networks(self) -> dict[str, nn.Module]:
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        # The denoisers come first: a file of adapters lists them so.
        return {name: parts[name] for name in sorted(parts, key=lambda name: name not in self.DENOISERS)}

    def roles(self) -> dict[str, tuple[str, ...]]:
        text = tuple(name for name in self.networks() if name.startswith("text_encoder"))
        return {"denoiser": self.DENOISERS, "text": text, "vae": (self.CODEC,)}

    @property
    def main(self) -> nn.Module:
        """The first denoiser: found at once, since every prediction asks for its device and type."""
        return self.denoiser

    @property
    def denoiser(self) -> Any:
        """The first denoiser."""
        return getattr(self.pipe, self.DENOISERS[0])

    @property
    def vae(self) -> Any:
        """The network between pixels and what the denoiser works on."""
        return getattr(self.pipe, self.CODEC)

    def to(self, device: torch.device | str, *parts: str) -> Self:
        self._float32_codec = None
        return super().to(device, *parts)

    def save(self, folder: Path) -> None:
        with self.folded():
            self.pipe.save_pretrained(folder, safe_serialization=True)

    def _identify(self, parts: Sequence[str], digest: Any) -> None:
        """Text features depend on the vocabulary too, and latents on whether the VAE works in tiles."""
        if self.CODEC in self.names(parts) and getattr(self.vae, "use_tiling", False):
            digest.update(b"tiles")
        if set(self.names(parts)) & set(self.names(["text"])):
            for name, tokenizer in sorted(self.pipe.components.items()):
                if name.startswith("tokenizer") and tokenizer:
                    digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())

    # -- text ---------------------------------------------------------------------------------------------------

    def embed(self, prompts: Sequence[str], *, negative: bool = False) -> Condition:
        """Encode prompts as the stock pipeline does; differentiable where a text encoder requires gradients.

        Args:
            negative: whether they are what it guides away from, which a few pipelines encode otherwise.

        Raises:
            UserError: a text encoder overflows in float16, as T5 and Gemma do.
        """
        self.reader.say(prompts)
        with self.autocast(), quiet():
            encode = self._embed_negative if negative else self._embed
            cond = encode(list(prompts))
        if self._halved() and not cond.tokens.isfinite().all():
            raise UserError(
                f"a text encoder of '{self.source}' overflows in float16: set model.dtype (or train.precision) to bf16"
            )
        return cond.to(self.device)

    def _halved(self) -> bool:
        """Whether text encoders compute in float16."""
        weights = {dtype_of(encoder) for encoder in self.of(*self.roles().get("text", ())).values()}
        return torch.float16 in {self.precision, *weights}

    @abstractmethod
    def _embed(self, prompts: list[str]) -> Condition:
        """`embed`, on whatever device the text encoders are."""

    def _embed_negative(self, prompts: list[str]) -> Condition:
        """`embed` of negative prompts."""
        return self._embed(prompts)

    def look_up(self, prompt: str) -> None:
        """Have the text encoders read a prompt alone, whatever else stands beside prompts, for those who watch them."""
        self.embed([prompt])

    def unconditional(self, count: int) -> Condition:
        """What the stock pipeline guides away from when no negative prompt is given, `count` times."""
        return self.embed([""] * count, negative=True)

    # -- pictures -----------------------------------------------------------------------------------------------

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [b, 3, (F), H, W], about [-1, 1] and not clamped, of what the denoiser works on."""

    def guidance(self, scale: float) -> Guidance:
        """What the stock pipeline does at `guidance_scale=scale`."""
        return Embedded(scale=scale) if self.embedded else classifier_free(scale + self.GUIDANCE_OFFSET)

    @abstractmethod
    def samplers(self) -> tuple[str, ...]:
        """Names of the samplers that suit the family; `model` is the pipeline's own."""

    @abstractmethod
    def sampler(self, name: str) -> Any:
        """A sampler made anew. Raises UserError for one that does not suit, listing those that do."""

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width of a picture in pixels, the model's own where they are left open.

        Raises:
            UserError: sides that the pipeline does not take, or many times those that the model was made for.
        """
        height, width = height or self.resolution, width or self.resolution
        if height % self.unit or width % self.unit:
            raise UserError(f"height and width must be multiples of {self.unit}, not {height} and {width}")
        self.check_area(height, width)
        return height, width

    def check_area(self, height: int, width: int) -> None:
        """Refuse pictures of many times as many pixels as the model was made for, or longer than it has places for.

        Raises:
            UserError: naming how many times, or how long they may be.
        """
        times = height * width / self.resolution**2
        if times > _MOST_AREA:
            raise UserError(
                f"{height}x{width} pixels are {times:.0f} times the {self.resolution}x{self.resolution} that the model "
                f"was made for, and its attention takes {times**2:.0f} times as long: take at most {_MOST_AREA} times"
            )
        if self.longest is not None and max(height, width) > self.longest:
            raise UserError(f"height and width must be at most {self.longest}, not {height} and {width}")

    def check_steps(self, steps: int) -> None:
        """Refuse more sampling steps than the noise schedule has.

        Raises:
            UserError: naming how many there are.
        """
        most = self.pipe.scheduler.config.get("num_train_timesteps")
        if most is not None and steps > most:
            raise UserError(
                f"{steps} sampling steps are more than the {most} of the model's noise schedule: take fewer"
            )

    @torch.no_grad()
    def draw(
        self,
        requests: Sequence[Request],
        *,
        steps: int,
        guidance: Guidance,
        sampler: str = "model",
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Pictures of the stock pipeline as it stands, whatever is attached to its networks.

        Args:
            requests: n prompts with their seeds, and what the model reads besides (`reads`). A picture does not depend
                on what else is drawn, but for rounding.
            steps: of the sampler. guidance: as from `guidance`. sampler: one of `samplers`.
            size: height and width in pixels.

        Returns:
            float32 [n, height, width, 3] in [0, 1]; clips have their frames as a second axis.
        """
        self.check_steps(steps)
        self.reads.check(self.source, requests)
        self.reader.say([text for request in requests for text in (request.prompt, request.negative)])
        made, before, bar = self.sampler(sampler), self.pipe.scheduler, getattr(self.pipe, "_progress_bar_config", {})
        self.pipe.scheduler = made
        self.pipe.set_progress_bar_config(disable=True)
        try:
            with self._present(), quiet():
                # Pipelines take pictures of one size in a batch, and some of one request alone.
                shown = any(request.pictures for request in requests)
                calls, sides = [[one] for one in requests] if shown else [requests], self.size(*(size or ()))
                return np.concatenate([self._draw_guided(c, sides, steps, guidance) for c in calls])
        finally:
            self.pipe.scheduler = before
            self.pipe.set_progress_bar_config(**bar)

    def _draw_guided(
        self, requests: Sequence[Request], size: tuple[int, int], steps: int, guidance: Guidance
    ) -> np.ndarray:
        with guidance.attach(self, [request.prompt for request in requests]):
            return self._draw(requests, size, steps, self._stock(guidance.stock(), requests))

    @abstractmethod
    def _draw(
        self, requests: Sequence[Request], size: tuple[int, int], steps: int, options: dict[str, Any]
    ) -> np.ndarray:
        """`draw` with the pipeline made ready; `options` are those of guidance."""

    def _stock(self, guidance: Guidance, requests: Sequence[Request]) -> dict[str, Any]:
        """Guidance as arguments of the pipeline."""
        if isinstance(guidance, CFG):
            if self.embedded:
                raise UserError(
                    f"'{self.source}' is told its guidance, and its pipeline makes no second call: take embedded in "
                    "the place of cfg"
                )
            if guidance.interval != (0.0, 1.0):
                raise UserError("the stock pipeline guides at every step: leave the interval out to draw with it")
            # Without any, pipelines guide away from `unconditional`, which need not be the empty prompt.
            negatives = [request.negative for request in requests]
            return {
                "guidance_scale": guidance.scale - self.GUIDANCE_OFFSET,
                "negative_prompt": negatives if any(negatives) else None,
            }
        if isinstance(guidance, Embedded):
            if any(request.negative for request in requests):
                raise UserError(
                    f"'{self.source}' carries its guidance inside, which guides away from nothing: leave the negative "
                    "prompt out"
                )
            return {"guidance_scale": guidance.scale}
        return {"guidance_scale": 1.0 - self.GUIDANCE_OFFSET}

    @contextmanager
    def _present(self) -> Iterator[None]:
        """All networks on one device for a while; those that were released go back after it."""
        device = self.device
        away = [name for name, network in self.networks().items() if next(network.parameters()).device != device]
        if away:
            self.to(device, *away)
        try:
            yield
        finally:
            if away:
                self.release(*away)

    def _codec(self) -> Any:
        """The VAE, or a float32 copy of one that is known to overflow in float16."""
        if dtype_of(self.vae) != torch.float16 or not self.vae.config.get("force_upcast"):
            return self.vae
        if self._float32_codec is None:
            self._float32_codec = copy.deepcopy(self.vae).float()
        return self._float32_codec


def own_generator(request: Request) -> torch.Generator:
    """The generator of a request, on the CPU: its picture does not depend on its batch, its process or its place in a
    list, and one seed gives unrelated noise to different prompts."""
    digest = hashlib.sha256(f"{request.seed}\0{request.prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
