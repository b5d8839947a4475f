"""`DiffusionModel`: a pipeline whose denoiser works on continuous latents, of pictures or of clips."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from visiontune.core import Condition, Request
from visiontune.diffusion.samplers import make_sampler, sampler_names
from visiontune.diffusion.schedule import Schedule, calculate_mu, evenly
from visiontune.errors import UserError
from visiontune.models._rated import SCORES
from visiontune.models._reading import apart
from visiontune.models.base import dtype_of, require
from visiontune.models.pipeline import PipelineModel, own_generator

if TYPE_CHECKING:
    from PIL.Image import Image

_NO_SIGNAL = 2.0**-12  # what samplers that divide by alpha have in the place of 0
Generators = torch.Generator | list[torch.Generator] | None
# Left, top, width and height in pixels.
Box = tuple[int, int, int, int]


class DiffusionModel(PipelineModel):
    """A family that denoises latents [b, c, (f), h, w].

    Attributes:
        schedule: the noise schedule and the meaning of the prediction.
        latent_channels: channels of a latent.
        FLOW: the family predicts flow, and a scheduler of another kind is refused.
        EVENLY: its pipeline gives its sampler levels that are evenly spread, and the sampler only shifts them.
        LOGIT_STD: the deviation of the logit-normal by which its pipeline spreads levels before they are shifted; None
            where they are even, or nearly so.
    """

    EVENLY: ClassVar[bool] = False
    FLOW: ClassVar[bool] = False
    LOGIT_STD: ClassVar[float | None] = None

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        self.schedule = Schedule.from_scheduler(pipe.scheduler)
        lightless = self.schedule.prediction == "eps" and float(self.schedule.alphas[:-1].min()) <= _NO_SIGNAL
        require(
            not lightless,
            self.source,
            "it predicts noise, which says nothing of the picture where its schedule leaves no signal (zero terminal "
            "SNR): set prediction_type in its scheduler_config.json to v_prediction if it was trained so, else "
            "rescale_betas_zero_snr to false",
        )
        require(not self.FLOW or self.schedule.prediction == "flow", self.source, "its scheduler is not one of flow")
        own = self.vae.config
        self.latent_channels = int(own["latent_channels"] if "latent_channels" in own else own["z_dim"])
        self._shift, self._scale = _latent_affine(self.vae.config)

    def check_steps(self, steps: int) -> None:
        super().check_steps(steps)
        if steps < 2 and self.pipe.scheduler.config.get("shift_terminal"):
            raise UserError("one sampling step is both ends of a noise schedule with shift_terminal: take two or more")

    # -- shape, scale and grid ----------------------------------------------------------------------------------

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """[c, h, w] of the latents of a picture of that many pixels; the model's own size where it is left open."""
        sides = (side // self.downsample for side in (height or self.resolution, width or self.resolution))
        return (self.latent_channels, *sides)

    def chain(self, steps: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Where each step of the family's own sampler stands and where it leads: t and t_next, [steps], on the CPU.

        Args:
            shape: [c, (f), h, w] of the latents, by which some families shift their steps.
        """
        sigmas = evenly(steps) if self.EVENLY else None
        return self.schedule.timesteps(steps, mu=self.mu(shape, steps), sigmas=sigmas)

    def mu(self, shape: Sequence[int], steps: int | None = None) -> float | None:
        """The shift by resolution that the family's pipeline tells its sampler; None where it tells none.

        Args:
            shape: [c, (f), h, w] of the latents.
            steps: of the sampler, by which one family shifts too; None in training, which has none.
        """
        return None

    def _mu_of_patches(self, shape: Sequence[int], patch: int, **defaults: float) -> float:
        """The shift by the number of patches, as the scheduler's config says; `defaults` for what it does not say."""
        height, width = (side // patch for side in shape[-2:])
        return calculate_mu(height * width, {**defaults, **self.schedule.spacing.config})

    def sampling_shift(self, shape: Sequence[int]) -> float:
        """k of the shift by which the family's own sampler moves its steps at latents [c, (f), h, w]; 1 for none."""
        return self.schedule.sampling_shift(self.mu(shape))

    def to_latents(self, z: Tensor) -> Tensor:
        """What the denoiser works on, of what the VAE gives: (z - shift) scale, a number or one for each channel."""
        return (z - _along_channels(self._shift, z)) * _along_channels(self._scale, z)

    def from_latents(self, latents: Tensor) -> Tensor:
        """What the VAE decodes: `to_latents` undone."""
        return latents / _along_channels(self._scale, latents) + _along_channels(self._shift, latents)

    def placed(self, cond: Condition, box: Box, canvas: tuple[int, int] | None) -> Condition:
        """Conditions of a region of a picture, for families that tell the network of sizes.

        Args:
            box: the region. canvas: height and width of the picture that the region is a part of, in pixels; None for a
                region that counts as a picture by itself.
        """
        return cond

    # -- pixels -------------------------------------------------------------------------------------------------

    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and standard deviation of the VAE posterior, unscaled.

        Args:
            pixels: [b, 3, (F), H, W] in [-1, 1], H and W multiples of `downsample`.

        Returns:
            [b, 2c, (f), h, w]: the mean's channels, then the deviation's, in `pixels`' dtype.
        """
        vae = self._codec()
        posterior = vae.encode(pixels.to(device_of(vae), dtype_of(vae))).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).to(self.device, pixels.dtype)

    def latents_from_moments(self, moments: Tensor, eps: Tensor | None = None) -> Tensor:
        """Scaled latents [b, c, (f), h, w] from `moments`: mean + std * eps, or the mean where `eps` is None."""
        mean, std = moments.chunk(2, dim=1)
        return self.to_latents(mean if eps is None else mean + std * eps)

    def encode(self, pixels: Tensor, *, generator: Generators = None, sample: bool = True) -> Tensor:
        """Scaled latents [b, c, (f), h, w] of `pixels` in [-1, 1]: a posterior sample, or its mean if not `sample`."""
        moments = self.moments(pixels)
        if not sample:
            return self.latents_from_moments(moments)
        shape = torch.Size((moments.shape[0], moments.shape[1] // 2, *moments.shape[2:]))
        eps = randn_tensor(shape, generator=generator, device=moments.device, dtype=moments.dtype)
        return self.latents_from_moments(moments, eps)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [b, 3, (F), H, W], about [-1, 1] and not clamped, of scaled latents; differentiable."""
        vae = self._codec()
        z = self.from_latents(latents.to(device_of(vae)))
        with self.autocast():
            return vae.decode(z.to(dtype_of(vae)), return_dict=False)[0].to(self.device, latents.dtype)

    # -- pictures beside the prompt -----------------------------------------------------------------------------

    def read(
        self,
        requests: Sequence[Request],
        *,
        negative: bool = False,
        size: tuple[int, int] | None = None,
        generator: Generators = None,
    ) -> Condition:
        """The conditions of requests: their prompts, as `embed` gives them, and their pictures, as `draw` shows them.

        Args:
            negative: whether of what they are guided away from.
            size: height and width in pixels of what is drawn, the model's own where it is left open; a picture that is
                painted into gets it.
            generator: of the posterior of a picture that is painted into, which stock pipelines draw from; without one
                it is the mean. References are means.

        Raises:
            UserError: other numbers of pictures than the model reads (`reads`).
        """
        self.reads.check(self.source, requests)
        cond = self.words(requests, negative)
        if not any(request.pictures for request in requests):
            return cond
        return self._beside(cond, requests, self.size(*(size or ())), generator)

    def words(self, requests: Sequence[Request], negative: bool = False) -> Condition:
        """`read` without what stands beside the words, which some text encoders read pictures with, too."""
        if negative and not any(one.negative for one in requests):
            return self.unconditional(len(requests))
        return self.embed([one.negative if negative else one.prompt for one in requests], negative=negative)

    def _beside(
        self, words: Condition, requests: Sequence[Request], size: tuple[int, int], generator: Generators
    ) -> Condition:
        """The condition with the pictures of its rows: as channels of the noisy latents, or as references."""
        if not self.reads.channels:
            shown = [tuple(self.reference(one) for one in request.pictures) for request in requests]
            return replace(words, references=shown)
        given = self._stock_reading(requests, size)
        pictures = self.pipe.image_processor.preprocess(given["image"], *size)
        if not self.reads.mask:
            latents = self.encode(pictures.to(self.device), sample=False)
            return replace(words, extra={**words.extra, "channels": self.edited(latents)})
        masks = self.pipe.mask_processor.preprocess(given["mask_image"], *size)
        kept = (pictures * (1 - masks)).to(self.device)
        hidden = self.encode(kept, generator=generator, sample=generator is not None)
        return replace(words, extra={**words.extra, "channels": self.channels(hidden, masks)})

    def edited(self, latents: Tensor) -> Tensor:
        """What a network that edits reads beside noisy latents, of scaled latents [b, c, h, w] of the picture: those of
        the VAE, unscaled, as InstructPix2Pix was trained."""
        return self.from_latents(latents)

    def channels(self, hidden: Tensor, masks: Tensor) -> Tensor:
        """What a network that paints reads beside noisy latents.

        Args:
            hidden: [b, c, h, w] scaled latents of the pictures, grey (0) where they are painted.
            masks: [b, 1, H, W] in pixels, 1 where they are.

        Returns:
            [b, k, h, w], the channels of the pictures and those of the masks.
        """
        raise NotImplementedError

    def reference(self, picture: Image) -> Tensor:
        """Scaled latents [c, h, w] of a picture, the mean, at the size to which the pipeline brings it."""
        pixels = self._fitted(picture.convert("RGB")).to(self.device)
        return self.encode(pixels, sample=False)[0]

    def _fitted(self, picture: Image) -> Tensor:
        """Pixels [1, 3, H, W] in [-1, 1] of a picture, of the size at which the pipeline reads it."""
        raise NotImplementedError

    @property
    def paints(self) -> bool:
        """Whether it paints into a picture, of which its network sees what is left in `channels`."""
        return self.reads.mask

    # -- the denoiser -------------------------------------------------------------------------------------------

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's own prediction (`schedule.prediction` says of what).

        Args:
            x_t: [b, c, (f), h, w] noisy latents.
            t: [b] or scalar timestep of each row.
            cond: the rows' conditions. Rows that are shown pictures of other sizes are predicted one size after the
                other.

        Returns:
            As `x_t`, in its dtype, whatever the denoiser computes in.
        """
        self.reads.check_condition(self.source, cond)
        with self.autocast():
            rows, told = t.expand(len(x_t)), cond.to(dtype=self.dtype)
            # Their sines turn by hundreds of times what a number is rounded by.
            exact = {name: cond.extra[name].float() for name in ("guidance", SCORES) if name in cond.extra}
            told = replace(told, extra={**told.extra, **exact})
            return apart(self._predict_rated, x_t.to(self.dtype), rows, told).to(x_t.dtype)

    def _predict_rated(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """`_predict` of rows that are told ratings of their own (`scores`), if they are."""
        with self.telling(cond.extra.get(SCORES)):
            return self._predict(x_t, t, cond)

    @abstractmethod
    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """`predict` in the denoiser's dtype, with t [b] and rows that are shown pictures alike; here a family turns its
        network's sign and time to ours."""

    def _widened(self, x_t: Tensor, cond: Condition) -> Tensor:
        """Noisy latents with the channels that stand beside them."""
        beside = cond.extra.get("channels")
        if beside is None or beside.shape[2:] != x_t.shape[2:]:
            found = "none" if beside is None else "those of a picture of another size"
            raise ValueError(f"'{self.source}' needs channels of {self.reads.words()}, not {found}: see read()")
        return torch.cat([x_t, beside], dim=1)

    # -- the stock pipeline -------------------------------------------------------------------------------------

    def samplers(self) -> tuple[str, ...]:
        return sampler_names(self.pipe.scheduler)

    def sampler(self, name: str) -> Any:
        return make_sampler(name, self.pipe.scheduler)

    def start_noise(
        self, request: Request, size: tuple[int, int] | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The noise [c, (f), h, w] from which `draw` starts a request, float32 on the CPU unless it brings its own.

        Args:
            size: height and width in pixels, the model's own where it is left open.
            generator: the request's own, which goes on with the noise of the steps; made anew where it is left open.
        """
        shape = self.latent_shape(*(size or ()))
        # Drawn in any case, so that the noise of the steps is the seed's.
        own = torch.randn(shape, generator=generator or own_generator(request))
        if request.noise is None:
            return own
        if request.noise.shape != own.shape:
            raise ValueError(f"noise of shape {tuple(request.noise.shape)} for a picture of {tuple(own.shape)}")
        return request.noise

    def _draw(
        self, requests: Sequence[Request], size: tuple[int, int], steps: int, options: dict[str, Any]
    ) -> np.ndarray:
        generators = [own_generator(request) for request in requests]
        starts = [self.start_noise(one, size, own) for one, own in zip(requests, generators, strict=True)]
        noise = torch.stack(starts)
        return self.pipe(
            prompt=[request.prompt for request in requests],
            num_inference_steps=steps,
            latents=self._stock_latents(noise.to(self.device, self.dtype)),
            generator=generators,
            height=size[0],
            width=size[1],
            output_type="np",
            **self._stock_reading(requests, size),
            **options,
        ).images

    def _stock_reading(self, requests: Sequence[Request], size: tuple[int, int]) -> dict[str, Any]:
        """Pictures as arguments of the pipeline, which takes those of one request at a time."""
        return {}

    def _stock_latents(self, noise: Tensor) -> Tensor:
        """Noise [b, c, (f), h, w] in the shape that the pipeline takes as `latents`."""
        return noise


def require_fixed_shift(scheduler: Any, source: str) -> None:
    """Refuse a scheduler that shifts by resolution, for pipelines that do not tell it how far."""
    fixed = not scheduler.config.get("use_dynamic_shifting", False)
    why = "its pipeline shifts no steps by resolution: set use_dynamic_shifting to false in its scheduler_config.json"
    require(fixed, source, why)


def device_of(module: Any) -> torch.device:
    """Where a module lies."""
    return next(module.parameters()).device


def _latent_affine(config: Any) -> tuple[Tensor, Tensor]:
    """Shift and scale of `latents = (z - shift) * scale` from a VAE's config, as [1] or [c]."""
    scale = torch.tensor([float(config.get("scaling_factor") or 1.0)])
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return torch.tensor(mean), scale / torch.tensor(std)
    return torch.tensor([float(config.get("shift_factor") or 0.0)]), scale


def _along_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(1, -1, *(1,) * (like.ndim - 2))
