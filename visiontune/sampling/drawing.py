"""How a batch of a sampling run is drawn: plainly, with a search, or beside what a reward does not guide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from visiontune.core import Request
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.ops.threads import Threads
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.guided import Judged, check
from visiontune.sampling.manifest import Job
from visiontune.sampling.pipeline import images
from visiontune.sampling.searched import Searcher
from visiontune.sampling.shown import NOTHING, Shown, read, size_for
from visiontune.search.asked import Asked

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

# A picture, and what its line in the manifest says besides.
Drawn = tuple[np.ndarray, dict[str, Any]]
Draw = Callable[[Sequence[Job]], list[Drawn]]
# Steps of a batch: a trial of numbers of threads costs about ten.
WORTH_TRYING = 200


def check_guidance(config: SampleConfig) -> None:
    """Refuse, before a model is opened, terms that are wrong, and one in the place of a scale that was given, too."""
    stack = GuidanceStack.of_options(config)
    instead = None if stack is None else stack.base or stack.told
    if instead is not None and config.cfg_scale is not None:
        raise UserError(f"guidance has {instead.name}, which takes the place of cfg_scale: leave one of them out")
    if config.search is not None and config.held_out is not None:
        raise UserError("a search has a held_out of its own: put it there, as search.held_out")
    if config.search is None:
        check(stack, config.held_out)


def drawing(config: SampleConfig, model: PipelineModel, search: Asked | None) -> tuple[Draw, str]:
    """How a batch is drawn, and what is to be said of that."""
    shown, how = _beside(config, model)
    options = {"batch_size": config.batch_size, **how}
    shown = shown.fitted(model, model.size(options["height"], options["width"]))
    draw, said = _chosen(config, model, search, shown, options)
    if config.canvas:
        draw = partial(_painted, draw)
    return (partial(_pasted, shown, draw) if config.paste else draw), said


def _chosen(
    config: SampleConfig, model: PipelineModel, search: Asked | None, shown: Shown, options: dict[str, Any]
) -> tuple[Draw, str]:
    if search is not None:
        searcher = Searcher.of(search, model, **options)
        return partial(_searched, config, searcher, shown), searcher.plan()
    if config.held_out is not None:
        return partial(_judged, config, Judged.of(config.held_out, model, **options), shown), ""
    return partial(plain, config, model), ""


def _painted(draw: Draw, batch: Sequence[Job]) -> list[Drawn]:
    """The right panels of canvases."""
    return [(picture[:, picture.shape[1] // 2 :], row) for picture, row in draw(batch)]


def _pasted(shown: Shown, draw: Draw, batch: Sequence[Job]) -> list[Drawn]:
    return [(shown.pasted(picture), row) for picture, row in draw(batch)]


def plain(config: SampleConfig, model: PipelineModel, batch: Sequence[Job]) -> list[Drawn]:
    """The pictures of a batch, without search and judgement."""
    shown, how = _beside(config, model)
    drawn = images(
        model,
        [job.prompt for job in batch],
        [job.seed for job in batch],
        negative_prompt=config.negative_prompt,
        batch_size=len(batch),
        shown=shown,
        **how,
    )
    return [(image, {}) for image in drawn]


def requests(config: SampleConfig, batch: Sequence[Job], shown: Shown = NOTHING) -> list[Request]:
    """What is asked of a model, and what it is shown beside each prompt."""
    beside = shown.options()
    return [Request(prompt=job.prompt, seed=job.seed, negative=config.negative_prompt, **beside) for job in batch]


@contextmanager
def threads(
    config: SampleConfig, model: PipelineModel, batches: Sequence[Sequence[Job]], finished: dict[str, int]
) -> Iterator[None]:
    """As many threads as drew what is finished, since another number rounds otherwise; else as many as are faster."""
    before = torch.get_num_threads()
    size = sum(tensor.numel() for network in model.networks().values() for tensor in network.parameters())
    chosen = Threads(model.device, size)
    first = batches[0]
    if finished:
        chosen.load_state_dict({"count": max(next(iter(finished.values())), 0) or before})
    elif len(batches) * (config.steps or 0) >= WORTH_TRYING:
        one = replace(config, steps=1)
        chosen.choose(partial(plain, one, model, first))
    del model  # who draws with another one later is not to keep this one
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _beside(config: SampleConfig, model: PipelineModel) -> tuple[Shown, dict[str, Any]]:
    """What stands beside every prompt, and how every picture is drawn."""
    shown = read(config.picture_list(), config.mask)
    height, width = config.height, config.width
    if height is None and width is None:
        height, width = size_for(model, shown)
    if config.canvas:
        if not model.reads.mask:
            raise UserError(
                f"canvas is for models that paint into pictures, and '{model.source}' ({model.family}) is none: leave "
                "it out, or name an inpainting model"
            )
        height, width = model.size(height, width)
        shown, width = shown.on_canvas((height, width)), 2 * width
    return shown, {
        "steps": config.steps,
        "cfg_scale": config.cfg_scale,
        "guidance": GuidanceStack.of_options(config),
        "height": height,
        "width": width,
        "scheduler": config.scheduler,
        "image_cfg_scale": config.image_cfg_scale,
    }


def _searched(config: SampleConfig, searcher: Searcher, shown: Shown, batch: Sequence[Job]) -> list[Drawn]:
    return [(found.picture, {"search": row}) for found, row in searcher(requests(config, batch, shown))]


def _judged(config: SampleConfig, judged: Judged, shown: Shown, batch: Sequence[Job]) -> list[Drawn]:
    return [(picture, {"guided": row}) for picture, row in judged(requests(config, batch, shown))]
