"""The stock diffusers pipeline as a function of prompts and seeds.

Adapters are attached in place, so nothing here knows of them: what is sampled is what the pipeline gives elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from visiontune import adapters
from visiontune.core import Request
from visiontune.errors import UserError
from visiontune.sampling.shown import NOTHING, Shown

if TYPE_CHECKING:
    from visiontune.diffusion.guidance import Guidance
    from visiontune.guidance.stack import GuidanceStack
    from visiontune.models.pipeline import PipelineModel

# 256 pictures of 1024x1024.
_MOST_PIXELS = 2**28


@contextmanager
def evaluating(model: PipelineModel) -> Iterator[None]:
    """Evaluation mode for a while; a trainer finds its modules as it left them."""
    networks = model.networks()
    modules = [module for network in networks.values() for module in network.modules() if module.training]
    # Sets are asked as a whole, because they forget what they have computed when their mode changes.
    sets = [s for s in adapters.attached(networks).values() if s.training]
    for module in modules:
        module.training = False
    for adapter_set in sets:
        adapter_set.eval()
    try:
        yield
    finally:
        for module in modules:
            module.training = True
        for adapter_set in sets:
            adapter_set.train()


def checked_guidance(
    model: PipelineModel,
    steps: int,
    cfg_scale: float,
    terms: GuidanceStack | None = None,
    size: tuple[int, int] | None = None,
    image_cfg_scale: float | None = None,
) -> Guidance:
    """How pictures are guided; see `visiontune.guidance.stack.guidance_of`.

    Args:
        size: height and width in pixels, the model's own where they are left open.
        image_cfg_scale: of guidance by the picture that is edited; None for the pipeline's own.

    Raises:
        UserError: the model does not draw in so many steps, or cannot be guided so.
    """
    from visiontune.guidance.stack import GuidanceStack, guidance_of

    model.check_steps(steps)
    guidance = guidance_of(model, cfg_scale, terms, image_cfg_scale)
    if isinstance(guidance, GuidanceStack):
        guidance.plan(model, steps, size)
    return guidance


def images(
    model: PipelineModel,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int] = 0,
    *,
    steps: int = 25,
    cfg_scale: float = 4.0,
    guidance: GuidanceStack | None = None,
    negative_prompt: str = "",
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    scheduler: str = "model",
    shown: Shown = NOTHING,
    image_cfg_scale: float | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Sample one image for each pair ``(prompts[i], seeds[i])``.

    Args:
        model: any family; its stock pipeline runs on the device that it is on, with whatever adapters are attached.
        prompts: n texts; a single text goes with every seed.
        seeds: n seeds; a single seed goes with every prompt.
        steps: denoising steps.
        cfg_scale: guidance scale of the stock pipeline; with classifier-free guidance ``uncond + w (cond - uncond)``, 1
            runs the conditional branch alone.
        guidance: terms on top of it, or in its place where one of them says how the negative prompt acts.
        negative_prompt: prompt of the unconditional branch.
        batch_size: images in one pass; changes the result by rounding only.
        height: pixels; the model's resolution when left out. ``width`` likewise.
        scheduler: ``model`` for the pipeline's own, or another that suits the family: see ``model.samplers()``.
        shown: pictures beside every prompt, and a mask.
        image_cfg_scale: of guidance by the picture that is edited; the pipeline's own when left out.
        progress: show a bar.

    Returns:
        ``uint8 [n, height, width, 3]`` (clips: ``[n, frames, height, width, 3]``), the same bits
        whenever the same call is made again.

    Raises:
        UserError: the model draws nothing, numbers of prompts and seeds differ, a size or a sampler does not fit, or
            the model gave a number that is not finite.
    """
    guided, size = prepared(model, cfg_scale, guidance, steps, height, width, image_cfg_scale)
    beside = shown.fitted(model, size).options()
    requests = [Request(prompt=p, seed=s, negative=negative_prompt, **beside) for p, s in pair(prompts, seeds)]
    with tqdm(total=len(requests), unit="image", disable=not progress) as bar:
        return pictures(
            model,
            requests,
            steps=steps,
            guidance=guided,
            size=size,
            batch_size=batch_size,
            scheduler=scheduler,
            drawn=bar.update,
        )


def prepared(
    model: PipelineModel,
    cfg_scale: float,
    terms: GuidanceStack | None,
    steps: int,
    height: int | None,
    width: int | None,
    image_cfg_scale: float | None = None,
) -> tuple[Guidance, tuple[int, int]]:
    """The guidance and the size of pictures, as :func:`images` is told them.

    Raises:
        UserError: the model draws nothing, is not to be guided so, or has no pictures of that size.
    """
    if not hasattr(model, "draw"):
        raise UserError(f"model '{model.source}' ({model.family}) draws no pictures: take one that does")
    size = model.size(height, width)
    return checked_guidance(model, steps, cfg_scale, terms, size, image_cfg_scale), size


def pictures(
    model: PipelineModel,
    requests: Sequence[Request],
    *,
    steps: int,
    guidance: Guidance,
    size: tuple[int, int],
    batch_size: int,
    scheduler: str,
    drawn: Callable[[int], object] = lambda _: None,
) -> np.ndarray:
    """The pictures of requests as :func:`images` gives them.

    Args:
        guidance, size: as from :func:`prepared`. drawn: is told of each batch how many they were.
    """
    check_batch(min(batch_size, len(requests)), *size)
    parts = []
    with evaluating(model):
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            pixels = model.draw(batch, steps=steps, guidance=guidance, sampler=scheduler, size=size)
            finite = np.isfinite(pixels).reshape(len(batch), -1).all(1)
            if not finite.all():
                first = batch[int(np.argmin(finite))]
                raise UserError(
                    f"the image of prompt {first.prompt!r}, seed {first.seed} is not finite: sample in fp32 or bf16, "
                    "or lower the adapter's scale"
                )
            parts.append((pixels * 255).round().astype(np.uint8))
            drawn(len(batch))
    return np.concatenate(parts) if parts else np.zeros((0, *size, 3), np.uint8)


def check_batch(rows: int, height: int, width: int) -> None:
    """Refuse a batch of more pixels than any memory holds with what is computed from them.

    Raises:
        UserError: naming how large it is.
    """
    pixels = rows * height * width
    if pixels > _MOST_PIXELS:
        raise UserError(
            f"a batch of {rows} pictures of {height}x{width} has {pixels} pixels, which alone are "
            f"{pixels * 12 / 2**30:.1f} GiB: take a smaller batch_size, or smaller pictures"
        )


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
