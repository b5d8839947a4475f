"""`DiffusionModel` and `MaskedModel`: one stock diffusers pipeline seen as embed, predict or logits, decode."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from visiontune.core import Condition
from visiontune.diffusion.schedule import Schedule
from visiontune.errors import UserError
from visiontune.models._quantise import plain

Generators = torch.Generator | list[torch.Generator] | None
Part = Literal["vae", "text", "denoiser"]
_CONTINUOUS = ("schedule", "latent_channels", "moments", "latents_from_moments", "encode", "predict")


class Model(ABC):
    """What every family has: a stock pipeline `pipe`, whose modules are frozen and put in evaluation mode, and text.

    Attributes:
        family: the family's key, which is its file name.
        pipeline_classes: the diffusers pipeline classes that the family understands.
        load_options: keyword arguments for the pipeline's `from_pretrained`.
        DENOISER: the name that the denoiser has in the pipeline, which is the prefix of its saved keys.
        TARGETS: preset name -> layers of the denoiser, in the terms of `visiontune.adapters.attach`: a dotted end of a
            layer's name, a layer class, or a regular expression.
        TEXT_TARGETS: the same for the text encoders.
        source: what the user named: a pocket name, a folder or a Hub id.
        denoiser: the module that computes the prediction; a trainer may put its wrapped form here.
        vae: the network between pixels and what the denoiser works on.
        downsample: pixels per latent along one side. resolution: pixels per side the model was made for.
        max_tokens: tokens per prompt, longer prompts are cut.
    """

    family: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    load_options: ClassVar[dict[str, Any]] = {}
    DENOISER: ClassVar[str] = "unet"
    TARGETS: ClassVar[dict[str, tuple[str, ...]]]
    TEXT_TARGETS: ClassVar[dict[str, tuple[str, ...]]]

    denoiser: nn.Module
    vae: Any
    resolution: int

    def __init__(self, pipe: Any, source: str = "") -> None:
        self.pipe = pipe
        self.source = source or str(pipe.config.get("_name_or_path") or type(pipe).__name__)
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        self.downsample = int(pipe.vae_scale_factor)
        self.max_tokens = int(pipe.tokenizer.model_max_length)
        self._float32_vae: Any = None

    # -- text ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts as the stock pipeline does; differentiable where a text encoder requires gradients."""

    @abstractmethod
    def unconditional(self, count: int) -> Condition:
        """What the stock pipeline guides away from when no negative prompt is given, `count` times."""

    @property
    @abstractmethod
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders under the names they have in the pipeline."""

    # -- what adapters and trainers ask for ---------------------------------------------------------------------

    def components(self) -> dict[str, nn.Module]:
        """The modules that adapters may be attached to, under the prefixes of their saved keys."""
        return {self.DENOISER: self.denoiser, **self.text_encoders}

    def presets(self, components: Iterable[str] | None = None) -> dict[str, tuple[str, ...]]:
        """Target presets for the named components (default: the denoiser): patterns of those components only."""
        names = set(components) if components is not None else {self.DENOISER}
        text = names & set(self.text_encoders)
        denoiser = names - set(self.text_encoders)
        return {
            preset: tuple(dict.fromkeys((*(own if denoiser else ()), *(self.TEXT_TARGETS[preset] if text else ()))))
            for preset, own in self.TARGETS.items()
        }

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the denoiser's first weight that has one."""
        return dtype_of(self.denoiser)

    def to(self, device: torch.device | str) -> Self:
        """Move the whole pipeline; returns self."""
        self.pipe.to(device)
        self._float32_vae = None
        return self

    def fingerprint(self, part: Part) -> str:
        """A short hash of a part's weights, cheap and equal on every device.

        Up to 64 values of each tensor are read, rounded to bfloat16: the denoiser's hash (which adapters store as the
        hash of their base) then does not depend on whether the model was loaded in float32 or bfloat16. The hashes of
        "vae" and "text" name the dtype, and "text" the vocabulary, because caches hold their outputs.
        """
        modules = {"vae": {"vae": self.vae}, "text": self.text_encoders, "denoiser": {self.DENOISER: self.denoiser}}
        if part not in modules:
            raise ValueError(f"no part '{part}' to hash; known: {', '.join(modules)}")
        digest = hashlib.sha256()
        for name, module in modules[part].items():
            digest.update(_hash_weights(module, name).encode())
            if part != "denoiser":
                digest.update(str(dtype_of(module)).encode())
        if part == "text":
            for tokenizer in (c for n, c in sorted(self.pipe.components.items()) if n.startswith("tokenizer") and c):
                digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def _codec(self) -> Any:
        """The VAE, or a float32 copy of one that is known to overflow in float16."""
        if dtype_of(self.vae) != torch.float16 or not self.vae.config.force_upcast:
            return self.vae
        if self._float32_vae is None:
            self._float32_vae = copy.deepcopy(self.vae).float()
        return self._float32_vae


class DiffusionModel(Model):
    """A family that denoises continuous latents.

    Attributes:
        schedule: the noise schedule and the meaning of the prediction.
        latent_channels: channels of a latent.
    """

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        self.vae = pipe.vae
        self.schedule = Schedule.from_scheduler(pipe.scheduler)
        self.latent_channels = int(pipe.vae.config.latent_channels)
        self._shift, self._scale = _latent_affine(pipe.vae.config)

    # -- pixels -------------------------------------------------------------------------------------------------

    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and standard deviation of the VAE posterior, unscaled.

        Args:
            pixels: [b, 3, H, W] in [-1, 1], H and W multiples of `downsample`.

        Returns:
            [b, 2c, H / downsample, W / downsample]: the mean's channels, then the deviation's, in `pixels`' dtype.
        """
        vae = self._codec()
        posterior = vae.encode(pixels.to(self.device, dtype_of(vae))).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).to(pixels.dtype)

    def latents_from_moments(self, moments: Tensor, eps: Tensor | None = None) -> Tensor:
        """Scaled latents [b, c, h, w] from `moments`: mean + std * eps, or the mean where `eps` is None."""
        mean, std = moments.chunk(2, dim=1)
        z = mean if eps is None else mean + std * eps
        return (z - self._shift.to(z)) * self._scale.to(z)

    def encode(self, pixels: Tensor, *, generator: Generators = None, sample: bool = True) -> Tensor:
        """Scaled latents [b, c, h, w] of `pixels` in [-1, 1]: a posterior sample, or its mean if not `sample`."""
        moments = self.moments(pixels)
        if not sample:
            return self.latents_from_moments(moments)
        shape = torch.Size((moments.shape[0], self.latent_channels, *moments.shape[2:]))
        eps = randn_tensor(shape, generator=generator, device=moments.device, dtype=moments.dtype)
        return self.latents_from_moments(moments, eps)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [b, 3, H, W], about [-1, 1] and not clamped, of scaled latents; differentiable."""
        vae = self._codec()
        z = latents.to(self.device) / self._scale.to(latents) + self._shift.to(latents)
        return vae.decode(z.to(dtype_of(vae)), return_dict=False)[0].to(latents.dtype)

    # -- the denoiser -------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's own prediction (`schedule.prediction` says of what).

        Args:
            x_t: [b, c, h, w] noisy latents.
            t: [b] or scalar integer timestep of each row.
            cond: the rows' conditions.

        Returns:
            [b, c, h, w] in `x_t`'s dtype, whatever the denoiser computes in.
        """


class MaskedModel(Model):
    """A family that fills in masked tokens of a picture: masked (absorbing) discrete diffusion.

    A picture is a grid of tokens [b, h, w], int64, each below `vocabulary` or `mask_token`.

    Attributes:
        vocabulary: number of tokens a picture is made of; the logits' last axis.
        mask_token: stands for a token that is not known yet.
    """

    vocabulary: int
    mask_token: int

    @abstractmethod
    def logits(self, tokens: Tensor, cond: Condition) -> Tensor:
        """Logits [b, h, w, v], at least float32, of every token of the grid given the tokens [b, h, w] not masked."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Pixels [b, 3, H, W], about [-1, 1] and not clamped, of tokens [b, h, w] without a mask."""

    @abstractmethod
    def sampler(self, steps: int, temperature: tuple[float, float]) -> Any:
        """The stock scheduler, made anew and set to `steps`; `temperature` goes from the first step's to the last's."""

    def __getattr__(self, name: str) -> Any:
        if name in _CONTINUOUS:
            raise UserError(
                f"model '{self.source}' ({self.family}) fills in masked tokens and has no {name}, which this needs: "
                "take a model of continuous latents, or objective=unigrpo"
            )
        raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def _latent_affine(config: Any) -> tuple[Tensor, Tensor]:
    """Shift and scale of `latents = (z - shift) * scale` from a VAE's config, as [1, c or 1, 1, 1]."""
    scale = torch.tensor(float(config.scaling_factor)).view(1, 1, 1, 1)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return torch.tensor(mean).view(1, -1, 1, 1), scale / torch.tensor(std).view(1, -1, 1, 1)
    return torch.tensor(float(config.get("shift_factor") or 0.0)).view(1, 1, 1, 1), scale


def _hash_weights(module: nn.Module, name: str, samples: int = 64) -> str:
    digest = hashlib.sha256(name.encode())
    values = []
    for key, tensor in sorted(module.state_dict().items()):
        if tensor.is_floating_point():
            digest.update(f"{key}{tuple(tensor.shape)}".encode())
            stride = max(1, tensor.numel() // samples)
            values.append(plain(tensor.detach()).reshape(-1)[::stride].to(torch.bfloat16))
    digest.update(torch.cat(values).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def require(condition: bool, source: str, why: str) -> None:
    """Refuse a pipeline that has the right class but is not of the family: UserError naming `source`."""
    if not condition:
        raise UserError(f"model '{source}' is not supported: {why}")
