"""A denoiser of two layers with everything a trainer asks of a model, and batches for it; runs in milliseconds."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import nn

from visiontune.core import Batch, Condition
from visiontune.diffusion.guidance import classifier_free
from visiontune.diffusion.schedule import Schedule
from visiontune.models._reading import Reads
from visiontune.models.base import Model, freeze
from visiontune.objectives import denoising
from visiontune.objectives.base import generator
from visiontune.rewards.base import Reward
from visiontune.training.config import TrainConfig
from visiontune.training.loop import Trainer

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


class TinyDenoiser(nn.Module):
    """Two convolutions around a timestep and text shift; [b, 4, 8, 8] -> the same."""

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.first, self.last = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        self.time, self.text = nn.Linear(2, width), nn.Linear(8, width)
        self.checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        self.checkpointing = True

    def forward(self, x, t, tokens):
        level = (t.to(tokens.dtype) / 1000)[:, None]
        shift = self.time(torch.cat([level, level.square()], 1)) + self.text(tokens.mean(1))
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._body, x, shift, use_reentrant=False)
        return self._body(x, shift)

    def _body(self, x, shift):
        return self.last(self.dropout(torch.tanh(self.first(x) + shift[:, :, None, None])))


class TinyModel(Model):
    """A model of 4x8x8 latents without a pipeline, with a table of word vectors as its text encoder."""

    family, task, source = "tiny", "text-to-image", "tiny"
    TARGETS = MappingProxyType({role: {"all": ("Conv2d", "Linear", "Embedding")} for role in ("denoiser", "text")})
    downsample, unit, resolution = 2, 2, 16
    paints = WORDS_SEE = False
    reads = Reads()

    def __init__(self, prediction: str = "eps", seed: int = 0, denoiser: nn.Module | None = None, **options) -> None:
        torch.manual_seed(seed)
        self.denoiser = denoiser or TinyDenoiser(**options)
        self.encoder = nn.Embedding(64, 8)
        self.vae = nn.Linear(1, 1)
        self.schedule = Schedule.from_scheduler(
            DDPMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type=PREDICTIONS[prediction],
                clip_sample=False,
            )
        )
        freeze(self.networks().values())

    def networks(self):
        return {"unet": self.denoiser, "text_encoder": self.encoder, "vae": self.vae}

    def roles(self):
        return {"denoiser": ("unet",), "text": ("text_encoder",), "vae": ("vae",)}

    def save(self, folder) -> None:
        Path(folder).mkdir()
        save_file(self.denoiser.state_dict(), Path(folder) / "weights.safetensors")

    def latent_shape(self, height: int = 16, width: int = 16):
        return 4, height // 2, width // 2

    def chain(self, steps, shape):
        return self.schedule.timesteps(steps)

    def guidance(self, scale):
        return classifier_free(scale)

    def embed(self, prompts) -> Condition:
        words = [
            [int(hashlib.sha256(w.encode()).hexdigest(), 16) % 64 for w in (p.split() + [""] * 6)[:6]] for p in prompts
        ]
        return Condition(tokens=self.encoder(torch.tensor(words)))

    def unconditional(self, count: int) -> Condition:
        return self.embed([""] * count)

    def decode(self, latents):
        """Pixels [b, 3, 16, 16] in (-1, 1)."""
        return torch.tanh(F.interpolate(latents[:, :3] + 0.5 * latents[:, 3:], scale_factor=2))

    def predict(self, x_t, t, cond):
        with self.autocast():
            return self.denoiser(x_t, t, cond.tokens).to(x_t.dtype)


def tiny_batch(model, seed: int, instance: int, prior: int = 0, weight: float = 1.0, embedded: bool = True) -> Batch:
    """Instance rows, then prior rows of the given weight."""
    rows = instance + prior
    prompts = ["a photo of a sks dog"] * instance + ["a photo of a dog"] * prior
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        cond = model.embed(prompts) if embedded else None
    return Batch(
        data={"image": torch.randn(rows, *model.latent_shape(), generator=rng)},
        cond=cond,
        prompts=prompts,
        weight=torch.tensor([1.0] * instance + [weight] * prior),
        prior=torch.tensor([False] * instance + [True] * prior),
        ids=[f"{seed}-{i}" for i in range(rows)],
    )


class TinyRows:
    """Batch `k` is a function of `k`."""

    def __init__(self, model, batch_size: int = 2, prior: int = 0, embedded: bool = True) -> None:
        self.model, self.batch_size, self.prior, self.embedded = model, batch_size, prior, embedded

    def batch(self, step: int) -> Batch:
        return tiny_batch(self.model, step, self.batch_size, self.prior, embedded=self.embedded)

    def close(self) -> None:
        pass


class RowNoise(denoising.Denoising):
    """Noise and timestep of a row depend on the row alone, so that batches may be cut in different ways."""

    def __init__(self) -> None:
        super().__init__(denoising.Config())

    def errors(self, model, batch, tools):
        alone = [replace(tools, rng=generator(name)) for name in batch.ids]
        return torch.cat([super(RowNoise, self).errors(model, batch[i], alone[i]) for i in range(len(batch))])


class CutRows(TinyRows):
    """Batch `k` of size `n` is rows `k n ... (k + 1) n` of one endless list; prior rows likewise; ranks take turns."""

    def __init__(self, model, batch_size: int, rank: int = 0, world: int = 1, embedded: bool = True) -> None:
        super().__init__(model, batch_size, embedded=embedded)
        self.rank, self.world = rank, world

    def batch(self, step):
        start = (step * self.world + self.rank) * self.batch_size
        numbers = range(start, start + self.batch_size)
        single = [tiny_batch(self.model, n, 1, 1, weight=0.5, embedded=self.embedded) for n in numbers]
        return Batch.cat([b[0] for b in single] + [b[1] for b in single])


class TinyReward(Reward):
    """No two pixels count alike, and neither do two prompts."""

    name = "tiny"
    differentiable = True

    def score(self, images, prompts, meta):
        place = torch.linspace(0.5, 1.5, images[0].numel(), dtype=images.dtype).view(images.shape[1:])
        told = torch.tensor([len(prompt) / 10 for prompt in prompts], dtype=images.dtype)
        return told * (torch.sin(3 * images) * place).mean((1, 2, 3))


def interrupt(trainer, at: int) -> None:
    """Train until just after ``at`` steps and what belongs to them, as if stopped there by hand."""
    after = trainer._after

    def failing(step, metrics):
        after(step, metrics)
        if step == at:
            raise KeyboardInterrupt

    trainer._after = failing
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def tiny_trainer(
    out,
    *,
    objective=None,
    model=None,
    rows=None,
    adapters=None,
    under=None,
    seed=0,
    preview=None,
    reward=None,
    accelerator=None,
    guard=None,
    **train,
) -> Trainer:
    """A CPU run that writes no events unless asked."""
    model = model or TinyModel()
    return Trainer(
        model=model,
        adapters=adapters,
        under=under,
        objective=objective or denoising.build(denoising.Config()),
        rows=rows or TinyRows(model),
        train=TrainConfig(**{"steps": 4, "trackers": [], "device": "cpu", **train}),
        out=Path(out),
        preview=preview,
        seed=seed,
        reward=reward,
        accelerator=accelerator,
        guard=guard,
    )
