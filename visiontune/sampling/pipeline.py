"""The stock diffusers pipeline as a function of prompts and seeds.

Adapters are attached in place, so nothing here knows of them: what is sampled is what the pipeline gives elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AmusedScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from visiontune import adapters
from visiontune.diffusion.schedule import ddim_scheduler
from visiontune.errors import UserError
from visiontune.models.base import MaskedModel

if TYPE_CHECKING:
    from visiontune.models.base import DiffusionModel


def initial_noise(prompt: str, seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise ``float32 shape`` of one (prompt, seed) pair, drawn on the CPU.

    Each pair has a generator of its own, so an image does not depend on its batch, its process or its place in a list,
    and one seed gives unrelated noise to different prompts.
    """
    return torch.randn(tuple(shape), generator=own_generator(prompt, seed))


def own_generator(prompt: str, seed: int) -> torch.Generator:
    """The generator of one (prompt, seed) pair, on the CPU."""
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def make_scheduler(name: str, base: Any) -> Any:
    """A fresh sampler on the noise schedule of the scheduler ``base``; ``ddim`` is the one that rollouts step by.

    Masked tokens have no noise schedule: ``ddim``, the default, and ``model`` are both the pipeline's own for them.
    """
    config = base.config
    if isinstance(base, AmusedScheduler) and name in ("dpm++", "euler"):
        raise UserError(f"scheduler '{name}' adds and takes off noise, which masked tokens do not have: set model")
    if isinstance(base, AmusedScheduler):
        name = "model"
    if name == "ddim":
        return ddim_scheduler(base)
    if name == "dpm++":
        return DPMSolverMultistepScheduler.from_config(config)
    if name == "euler":
        return EulerDiscreteScheduler.from_config(config)
    if name == "model":
        return type(base).from_config(config)
    raise UserError(f"there is no scheduler '{name}'; known: ddim, dpm++, euler, model")


@contextmanager
def _prepared(model: DiffusionModel | MaskedModel, scheduler: str) -> Iterator[None]:
    """Sampler, evaluation mode and silence for a while; a trainer finds its modules as it left them."""
    pipe = model.pipe
    components = [c for c in pipe.components.values() if isinstance(c, nn.Module)]
    modules = [module for component in components for module in component.modules() if module.training]
    # Sets are asked as a whole, because they forget what they have computed when their mode changes.
    sets = [s for s in adapters.attached(model.components()).values() if s.training]
    before, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    pipe.scheduler = make_scheduler(scheduler, before)
    pipe.set_progress_bar_config(disable=True)
    for module in modules:
        module.training = False
    for adapter_set in sets:
        adapter_set.eval()
    try:
        yield
    finally:
        pipe.scheduler = before
        pipe.set_progress_bar_config(**bar)
        for module in modules:
            module.training = True
        for adapter_set in sets:
            adapter_set.train()


def _size(model: DiffusionModel | MaskedModel, height: int | None, width: int | None) -> tuple[int, int]:
    height, width = height or model.resolution, width or model.resolution
    # Stock pipelines refuse sizes that are no multiple of 8, even where the codec would take them.
    unit = max(model.downsample, 8)
    if height % unit or width % unit:
        raise UserError(f"height and width must be multiples of {unit}, not {height} and {width}")
    return height, width


def images(
    model: DiffusionModel | MaskedModel,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int] = 0,
    *,
    steps: int = 25,
    cfg_scale: float = 4.0,
    negative_prompt: str = "",
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    scheduler: str = "ddim",
    progress: bool = False,
) -> np.ndarray:
    """Sample one image for each pair ``(prompts[i], seeds[i])``.

    Args:
        model: any family; its stock pipeline runs on the device that it is on, with whatever adapters are attached.
        prompts: n texts; a single text goes with every seed.
        seeds: n seeds; a single seed goes with every prompt.
        steps: denoising steps.
        cfg_scale: classifier-free guidance w in ``uncond + w (cond - uncond)``; 1 runs the conditional branch alone.
        negative_prompt: prompt of the unconditional branch.
        batch_size: images in one pass; changes the result by rounding only. Masked models draw one at a time.
        height: pixels; the model's resolution when left out. ``width`` likewise.
        scheduler: ``ddim`` (deterministic), ``dpm++``, ``euler``, or ``model`` for the pipeline's own.
        progress: show a bar.

    Returns:
        ``uint8 [n, height, width, 3]``, the same bits whenever the same call is made again.

    Raises:
        UserError: numbers of prompts and seeds differ, a size does not fit, or the model gave a number that is not
            finite.
    """
    pairs = pair(prompts, seeds)
    height, width = _size(model, height, width)
    # The stock sampler of tokens takes one generator for a whole batch, so each picture is a batch of its own.
    batch_size = 1 if isinstance(model, MaskedModel) else batch_size
    parts = []
    with _prepared(model, scheduler), tqdm(total=len(pairs), unit="image", disable=not progress) as bar:
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            with torch.no_grad():
                pixels = model.pipe(
                    prompt=[prompt for prompt, _ in batch],
                    negative_prompt=[negative_prompt] * len(batch) if cfg_scale > 1 else None,
                    num_inference_steps=steps,
                    guidance_scale=cfg_scale,
                    **_start(model, batch, height, width),
                    height=height,
                    width=width,
                    output_type="np",
                ).images
            if not np.isfinite(pixels).all():
                first = batch[int(np.argmin(np.isfinite(pixels).all((1, 2, 3))))]
                raise UserError(
                    f"the image of prompt {first[0]!r}, seed {first[1]} is not finite: sample in fp32 or bf16, or lower"
                    " the adapter's scale"
                )
            parts.append((pixels * 255).round().astype(np.uint8))
            bar.update(len(batch))
    return np.concatenate(parts) if parts else np.zeros((0, height, width, 3), np.uint8)


def _start(model: DiffusionModel | MaskedModel, batch: Sequence[tuple[str, int]], height: int, width: int) -> Any:
    """What makes the pictures of (prompt, seed) pairs what they are: their noise, or where tokens are drawn from."""
    if isinstance(model, MaskedModel):
        ((prompt, seed),) = batch
        return {"generator": own_generator(prompt, seed)}
    shape = (model.latent_channels, height // model.downsample, width // model.downsample)
    noise = torch.stack([initial_noise(prompt, seed, shape) for prompt, seed in batch])
    reference = next(model.denoiser.parameters())
    return {"latents": noise.to(reference.device, reference.dtype)}


def pair(prompts: str | Sequence[str], seeds: int | Sequence[int]) -> list[tuple[str, int]]:
    """``(prompt, seed)`` pairs, a single value going with all of the other side.

    Raises:
        UserError: two lists of different lengths.
    """
    if isinstance(prompts, str):
        prompts = [prompts] * (1 if isinstance(seeds, int) else len(seeds))
    if isinstance(seeds, int):
        seeds = [seeds] * len(prompts)
    if len(prompts) != len(seeds):
        raise UserError(f"{len(prompts)} prompts cannot be paired with {len(seeds)} seeds: give one seed a prompt")
    return list(zip(prompts, map(int, seeds), strict=True))
