"""Options of a training run and of its previews."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from visiontune.sampling.config import Scheduler
from visiontune.schema import option

# The part that is no network.
TRIGGER = "trigger"
MEASURES = ("reward", "diversity", "high_frequency", "blank", "distance", "change")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The ``train:`` section of a recipe."""

    RENAMED: ClassVar[dict[str, str]] = {
        "denoiser": "parts, the list of what is trained: [text] trains the text encoders alone",
        "text_encoder": "parts, the list of what is trained: [denoiser, text] trains the text encoders too",
        "text_encoder_lr": "part_lr, rates by part: {text: 5e-5}",
    }

    steps: int = option(1000, least=1, greatest=1_000_000_000, help="optimiser steps in the whole run")
    batch_size: int = option(
        4, least=1, greatest=4096, help="instance rows per step and process; prior rows come on top"
    )
    accumulate: int = option(
        1, least=1, greatest=1_000_000, help="batches whose gradients are averaged into one optimiser step"
    )
    lr: float = option(1e-4, above=0, greatest=100, help="peak learning rate")
    part_lr: dict[str, float] = option(
        {}, above=0, greatest=100, help="learning rates of parts that have another: {text: 5e-5}"
    )
    trigger_lr: float | None = option(
        None, above=0, greatest=100, help="learning rate of the trigger's embedding, where it is trained; null: lr"
    )
    parts: list[str] | None = option(
        None,
        help="what is trained: networks by name (unet) or role (denoiser, text, vae), and with an adapter trigger, the "
        "meaning of data.trigger alone (without a network: textual inversion); null: the denoiser",
    )
    release: list[str] | None = option(
        None,
        help="parts that leave the accelerator once data are encoded, such as [text, vae]; drawing brings them back; "
        "null: those that no step needs",
    )
    optimizer: str = option(
        "adamw", help="adamw, sgd, adafactor, galore, natural_galore, or the dotted path of any torch optimiser class"
    )
    optimizer_options: dict[str, Any] = option({}, help="further arguments of the optimiser")
    matrix_options: dict[str, Any] = option(
        {}, help="options of the parameter groups with two-dimensional weights alone, such as GaLore's rank"
    )
    betas: tuple[float, float] = option(
        (0.9, 0.999), least=0, below=1, help="AdamW's decay rates of the gradient's moments"
    )
    weight_decay: float = option(1e-2, least=0, greatest=100, help="decoupled weight decay")
    warmup: int = option(0, least=0, greatest=1_000_000_000, help="steps over which the learning rate rises from 0")
    schedule: Literal["constant", "cosine", "linear"] = option("constant", help="learning rate after the warm-up")
    max_grad_norm: float | None = option(
        1.0, above=0, greatest=1e6, help="gradients are scaled down to this norm; null leaves them"
    )
    precision: Literal["no", "bf16", "fp16"] = option("no", help="autocast type; the trained weights stay float32")
    ema: float | None = option(
        None, least=0, below=1, help="decay of a moving average of the trained weights, which is then what is saved"
    )
    gradient_checkpointing: bool = option(
        False, help="recompute activations in the backward pass: less memory, more time"
    )
    checkpoint_every: int = option(500, least=1, greatest=1_000_000_000, help="steps between checkpoints")
    keep: int = option(2, least=1, greatest=1_000_000, help="newest checkpoints that are kept")
    resume: bool = option(False, help="go on from the newest checkpoint of the output folder, if it has one")
    log_every: int = option(
        10,
        least=1,
        greatest=1_000_000_000,
        help="steps between log rows; each row is the mean over the steps since the last",
    )
    trackers: list[str] = option(["tensorboard"], help="any of accelerate's trackers: tensorboard, wandb, trackio, ...")
    threads: int = option(
        0, least=0, greatest=4096, help="of the CPU; 0: one or all, whichever is faster for a small model, by trial"
    )
    device: Literal["auto", "cpu"] = option("auto", help="auto is the accelerator if there is one; cpu never uses it")

    def __post_init__(self) -> None:
        if self.warmup > self.steps:
            raise ValueError(f"warmup={self.warmup} is longer than steps={self.steps}: the rate would never be reached")
        if self.parts is not None and not self.parts:
            raise ValueError("parts leaves nothing to train: name a network or a role, or set it to null")

    @property
    def networks(self) -> list[str] | None:
        """The names and roles of networks among the parts."""
        return None if self.parts is None else [part for part in self.parts if part != TRIGGER]

    @property
    def trigger(self) -> bool:
        """Whether the embedding of the trigger is trained."""
        return TRIGGER in (self.parts or ())


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """The ``preview:`` section of a recipe: images drawn during training, always from the same noise."""

    prompts: list[str] = option([], help="prompts; empty draws no previews")
    pictures: list[str] = option(
        [], help="of models that edit or paint, the file of a picture for each prompt, in their order"
    )
    masks: list[str] = option(
        [], help="of models that paint, the file of a mask for each prompt, white where it paints"
    )
    samples: int = option(
        0,
        least=0,
        greatest=1000,
        help="of models that edit or paint, draw so many samples of the data too, the first ones: their captions, and "
        "what they were made of or where they are painted",
    )
    seeds: list[int] = option([0], least=0, greatest=2**63 - 1, help="seeds drawn for each prompt")
    every: int = option(
        500,
        least=1,
        greatest=1_000_000_000,
        help="steps between previews; one is drawn before the first step and one after the last",
    )
    steps: int = option(25, least=1, greatest=100_000, help="sampling steps")
    cfg_scale: float = option(4.0, least=-1000, greatest=1000, help="guidance scale")
    image_cfg_scale: float | None = option(
        None, least=1, greatest=1000, help="scale of guidance by the picture that is edited, as of sample"
    )
    guidance: list[str | dict[str, Any]] | None = option(
        None, help="terms that guide together, on top of cfg_scale or in its place, as of sample"
    )
    scheduler: Scheduler = option("model", help="sampler, as of sample")
    batch_size: int = option(4, least=1, greatest=4096, help="images drawn at once")

    def __post_init__(self) -> None:
        for name, files in (("pictures", self.pictures), ("masks", self.masks)):
            if files and len(files) != len(self.prompts):
                raise ValueError(f"{name} names {len(files)} files for {len(self.prompts)} prompts: give one for each")
        if self.masks and not self.pictures:
            raise ValueError("masks are of pictures: name those too")
        if (self.prompts or self.samples) and not self.seeds:
            raise ValueError("seeds names none: give one, or set prompts to []")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The ``judge:`` section: what the run has learnt of its subject and kept of its base, looked at when it has ended.

    The result is judged at every strength, and the checkpoints before it that are still there at strength 1.
    """

    clip: str | None = option(
        None,
        help="who judges: a CLIP's folder or Hub id; null: the oracle for subjects of the pocket world, or nobody",
    )
    scales: list[float] = option([0.7, 1.0], least=-4, greatest=4, help="strengths of the result")
    prompts: int = option(24, least=2, greatest=10_000, help="ordinary prompts that are drawn")
    seeds: int = option(2, least=1, greatest=4, help="pictures of each prompt for the subject")
    steps: int = option(25, least=1, greatest=100_000, help="sampling steps")
    cfg_scale: float = option(4.0, least=-1000, greatest=1000, help="guidance scale")

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("scales names none: give one, or set judge to none")


@dataclass(frozen=True, kw_only=True)
class GuardsConfig:
    """The ``guards:`` section of a recipe: alarms for online objectives whose reward rises while the pictures rot.

    Bounds are relative to what was measured before the first step unless they say otherwise; null turns one off.
    """

    every: int = option(
        50,
        least=1,
        greatest=1_000_000_000,
        help="steps between checks, besides one before the first step and one after the last",
    )
    on_alarm: Literal["stop", "warn", "lower_lr"] = option(
        "stop", help="end the run at its last good checkpoint, say so once for each measure, or lower the rate"
    )
    lr_factor: float = option(
        0.5, above=0, below=1, help="lower_lr multiplies the learning rate by this at every check with an alarm"
    )
    prompts: list[str] = option([], help="what is drawn; empty holds prompts of the run's own out of training")
    holdout: int = option(16, least=1, greatest=1_000_000, help="how many prompts are held out")
    seeds: list[int] = option(
        [0, 1], least=0, greatest=2**63 - 1, help="seeds drawn for each prompt; diversity needs two"
    )
    steps: int | None = option(None, least=1, greatest=100_000, help="sampling steps; null for the objective's")
    cfg_scale: float | None = option(None, least=-1000, greatest=1000, help="guidance scale; null for the objective's")
    guidance: list[str | dict[str, Any]] | None = option(
        None, help="terms that guide together, on top of cfg_scale or in its place; null for the objective's"
    )
    batch_size: int = option(8, least=1, greatest=4096, help="pictures drawn and scored at once")
    reward: str | dict[str, Any] | None = option(
        None, help="another reward than the trained one, with its options as in reward:; null for none"
    )
    reward_drop: float | None = option(
        0.15,
        above=0,
        greatest=1e6,
        help="how much the mean reward may fall, in deviations over the pictures at the start",
    )
    diversity_min: float | None = option(
        0.5, above=0, below=1, help="least share of the distance between seeds of a prompt"
    )
    high_frequency_from: float = option(
        0.25, above=0, below=0.5, help="cycles a pixel above which a frequency is high; 0.5 is the most"
    )
    high_frequency_factor: float | None = option(
        2.0, above=1, greatest=1e6, help="factor by which the share of high frequencies may grow or shrink"
    )
    blank_std: float = option(
        0.02, above=0, below=0.5, help="a picture is blank when no channel has this standard deviation, of 1"
    )
    blank_max: float | None = option(0.1, above=0, below=1, help="how much the share of blank pictures may rise")
    distance_max: float | None = option(
        0.5,
        above=0,
        below=1,
        help="most root mean square of a pixel's way from where the run began, absolute; noise is at 0.41",
    )
    change_max: float | None = option(
        0.5, above=0, greatest=1e6, help="most norm of the adapter's change by the norm of the weights, absolute"
    )
    terms: dict[str, float] = option(
        {},
        least=-1e9,
        greatest=1e9,
        help="bounds on what the objective logs, mean since the last check: {kl: 1, clip_fraction: 0.9}",
    )

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds names none: give one, or two to measure diversity")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ")
        if self.diversity_min is not None and len(self.seeds) < 2:
            raise ValueError("diversity is measured between seeds: give two or more, or set diversity_min to null")
        for name in self.terms:
            if name in MEASURES:
                raise ValueError(f"terms.{name} is what the objective logs; the guards' own has an option of its own")
