"""Stable Diffusion 1.x and 2.x: one CLIP text encoder and a UNet that predicts eps or v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from visiontune.core import Condition
from visiontune.models.base import DiffusionModel, require

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


class StableDiffusion(DiffusionModel):
    """`StableDiffusionPipeline`; its Condition has `tokens` alone."""

    family = "sd"
    pipeline_classes = ("StableDiffusionPipeline",)
    # Previews of a training run must show what the model makes, not the checker's black images.
    load_options: ClassVar[dict[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    TARGETS: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "attention+ff": (*_ATTENTION, "ff.net.0.proj", "ff.net.2"),
        "conv": ("Conv2d",),
        "all": ("Linear", "Conv2d"),
    }
    TEXT_TARGETS: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": _TEXT_ATTENTION,
        "attention+ff": (*_TEXT_ATTENTION, "mlp.fc1", "mlp.fc2"),
        "conv": (),
        "all": ("Linear",),
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        config = pipe.unet.config
        plain = config.in_channels == config.out_channels == self.latent_channels
        require(plain, self.source, f"its UNet takes {config.in_channels} channels; give a text-to-image checkpoint")
        undistilled = config.time_cond_proj_dim is None
        require(undistilled, self.source, "its guidance is distilled into the UNet; give the model it came from")
        self.denoiser = pipe.unet
        size = config.sample_size
        self.resolution = self.downsample * int(size if isinstance(size, int) else size[0])

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.pipe.text_encoder}

    def embed(self, prompts: Sequence[str]) -> Condition:
        tokens, _ = self.pipe.encode_prompt(list(prompts), self.pipe.text_encoder.device, 1, False)
        return Condition(tokens=tokens).to(self.device)

    def unconditional(self, count: int) -> Condition:
        return self.embed([""] * count)

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        dtype = self.dtype
        added = {key: value.to(x_t.device, dtype) for key, value in self._added(x_t, cond).items()}
        pred = self.denoiser(
            x_t.to(dtype),
            t,
            encoder_hidden_states=cond.tokens.to(dtype),
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]
        return pred.to(x_t.dtype)

    def _added(self, x_t: Tensor, cond: Condition) -> dict[str, Tensor]:
        """The UNet's conditioning beside the tokens."""
        return {}
