"""Options of a training run and of its previews."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The ``train:`` section of a recipe."""

    steps: int = option(1000, help="optimiser steps in the whole run")
    batch_size: int = option(4, help="instance rows per step and process; prior rows come on top")
    accumulate: int = option(1, help="batches whose gradients are averaged into one optimiser step")
    lr: float = option(1e-4, help="peak learning rate")
    denoiser: bool = option(True, help="train the denoiser; false, with text_encoder, trains the text encoders alone")
    text_encoder: bool = option(
        False, help="train the text encoders too: their adapters, or all weights without adapter"
    )
    text_encoder_lr: float | None = option(None, help="learning rate of the text encoders; null is lr")
    optimizer: str = option(
        "adamw", help="adamw, sgd, adafactor, galore, or the dotted path of any torch optimiser class"
    )
    optimizer_options: dict[str, Any] = option({}, help="further arguments of the optimiser")
    matrix_options: dict[str, Any] = option(
        {}, help="options of the parameter groups with two-dimensional weights alone, such as GaLore's rank"
    )
    betas: tuple[float, float] = option((0.9, 0.999), help="AdamW's decay rates of the gradient's moments")
    weight_decay: float = option(1e-2, help="decoupled weight decay")
    warmup: int = option(0, help="steps over which the learning rate rises from 0")
    schedule: Literal["constant", "cosine", "linear"] = option("constant", help="learning rate after the warm-up")
    max_grad_norm: float | None = option(1.0, help="gradients are scaled down to this norm; null leaves them")
    precision: Literal["no", "bf16", "fp16"] = option("no", help="autocast type; the trained weights stay float32")
    ema: float | None = option(
        None, help="decay of a moving average of the trained weights, which is then what is saved"
    )
    gradient_checkpointing: bool = option(
        False, help="recompute activations in the backward pass: less memory, more time"
    )
    checkpoint_every: int = option(500, help="steps between checkpoints")
    keep: int = option(2, help="newest checkpoints that are kept")
    resume: bool = option(False, help="go on from the newest checkpoint of the output folder, if it has one")
    log_every: int = option(10, help="steps between log rows; each row is the mean over the steps since the last")
    trackers: list[str] = option(["tensorboard"], help="any of accelerate's trackers: tensorboard, wandb, trackio, ...")
    device: Literal["auto", "cpu"] = option("auto", help="auto is the accelerator if there is one; cpu never uses it")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more")
        if not self.denoiser and not self.text_encoder:
            raise ValueError("denoiser=false leaves nothing to train: set text_encoder to true")
        if self.lr <= 0 or (self.text_encoder_lr is not None and self.text_encoder_lr <= 0):
            raise ValueError("lr and text_encoder_lr must be above 0")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError("ema must be in [0, 1), for instance 0.99")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError("max_grad_norm must be above 0, or null for no clipping")
        if self.warmup < 0:
            raise ValueError("warmup must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """The ``preview:`` section of a recipe: images drawn during training, always from the same noise."""

    prompts: list[str] = option([], help="prompts; empty draws no previews")
    seeds: list[int] = option([0], help="seeds drawn for each prompt")
    every: int = option(500, help="steps between previews; one is drawn before the first step and one after the last")
    steps: int = option(25, help="sampling steps")
    cfg_scale: float = option(4.0, help="guidance scale")
    batch_size: int = option(4, help="images drawn at once")

    def __post_init__(self) -> None:
        if min(self.every, self.steps, self.batch_size) < 1:
            raise ValueError("every, steps and batch_size must be 1 or more")
