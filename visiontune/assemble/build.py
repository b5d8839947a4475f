"""From a recipe to a trainer: the parts are opened in the order in which mistakes are cheapest to find."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune import files
from visiontune.assemble import beside, folder, parts, resources
from visiontune.config import Run
from visiontune.data.canvas import on_canvas
from visiontune.data.inventory import uncaptioned, unrated
from visiontune.data.preflight import preflight
from visiontune.data.readers import read
from visiontune.errors import UserError
from visiontune.outside import shown

if TYPE_CHECKING:
    from visiontune.adapters.base import AdapterSet
    from visiontune.data.base import Sample
    from visiontune.data.loader import BatchSampler
    from visiontune.models.base import Model
    from visiontune.objectives.base import Objective
    from visiontune.training.home import Home
    from visiontune.training.loop import Trainer

_log = logging.getLogger(__name__)


def build(
    run: Run,
    *,
    cache_dir: Path,
    draw: Callable[..., Any] | None = None,
    fill: bool = True,
    plan: bool = False,
    home: Home | None = None,
    say: Callable[[str], None] = _log.warning,
) -> Trainer:
    """The trainer of a run; nothing is written outside ``cache_dir`` unless ``plan``.

    Args:
        run: from :func:`visiontune.config.load_run`.
        cache_dir: where latents, text features and prior images are kept.
        draw: what draws prior images; ``visiontune.sampling.pipeline.images`` unless given.
        fill: encode all data now rather than when it is first drawn.
        plan: let the adapter look at the task; what it decides is kept in the run folder.
        home: the run folder, held.
        say: is told of pictures without a caption among others, and of words that the model does not read.
    """
    parts.check_shards(run)
    parts.check_offload(run)
    # Words and data come before the model, which may take minutes to open.
    preview = dataclasses.replace(run.preview, prompts=[parts.in_words(run, p) for p in run.preview.prompts])
    objective = parts.open_objective(run)
    beside.check_sets(run, objective)
    found = _data(run, objective)
    shown = beside.named(preview)
    parts.check_files(run, objective)
    reward = parts.load_reward(run, objective)
    _check(run, objective, reward)
    guard = parts.make_guard(run, found.held, objective)

    from accelerate.utils import set_seed

    from visiontune.adapters._method import start_follows
    from visiontune.models.words import lost
    from visiontune.training.devices import make_accelerator
    from visiontune.training.loop import Trainer

    model: Any = parts.open_model(run)
    under = parts.attach_under(run, model)
    objective.check(model, reward)
    if objective.needs.sets:
        model.couple()
    beside.check(run, model, objective, found.samples)
    preview, shown = beside.previews(preview, model, found.samples, shown, run.data)
    _check_sizes(run, model, objective)
    _check_dropout(run, model)
    # Some adapters start from random values; everything later draws from generators of its own.
    set_seed(run.seed)
    with start_follows() if plan else nullcontext():
        adapters = parts.attach_adapter(run, model, objective)
    if adapters is not None and adapters.plans and objective.needs.online:
        raise UserError(
            f"adapter '{adapters.method}' looks at a loss on data before training, which objective "
            f"'{run.objective['name']}' does not have: take lora, or start from a trained one (adapter.start)"
        )
    accelerator = make_accelerator(run.train, run.folder)
    resources.offload(run, model, adapters)
    if model.offloaded and accelerator.device.type == "cpu":
        say("model.offload: this run computes on the CPU, where all weights lie: copying blocks takes time for nothing")
    shards = _spread(run, model, adapters, under, objective, accelerator)
    bare = [*uncaptioned(found.samples), *unrated(found.samples, run.data)]
    for line in [*bare, *lost(model, _texts(found, preview.prompts))]:
        if accelerator.is_main_process:
            say(line)
    if accelerator.is_main_process:
        files.clear_abandoned(cache_dir)
    sets = [one for one in (under, adapters) if one is not None]
    rows = _rows(run, model, sets, objective, found, accelerator, cache_dir, draw, fill)
    if plan and adapters is not None and adapters.plans:
        _plan(run, model, adapters, objective, rows, accelerator)
    resources.speed_up(run, model)
    if not fill and not objective.needs.online:
        for index in range(2 * run.train.accumulate):
            rows.batch(index)  # while the encoders are where they are fast
    return Trainer(
        model=model,
        adapters=adapters,
        under=under,
        objective=objective,
        rows=rows,
        train=dataclasses.replace(run.train, release=resources.released(run, model, rows)),
        preview=preview,
        shown=shown,
        out=run.folder,
        seed=run.seed,
        metadata={**parts.metadata(run, [*(s.caption for s in found.samples), *found.prompts]), **objective.facts()},
        accelerator=accelerator,
        reward=reward,
        guard=guard,
        home=home,
        shards=shards,
    )


def _spread(run: Run, model: Any, adapters: Any, under: Any, objective: Objective, accelerator: Any) -> Any:
    """Move the model to the device; with FSDP in shares, as soon as nobody needs it whole there."""
    from visiontune.objectives.base import Objective
    from visiontune.training import sharding

    shards = sharding.of(accelerator)
    drawn = type(objective).prepare is not Objective.prepare or (adapters is not None and adapters.plans)
    encodes = set(model.names()) != {*sharding.networks_of(model, run.train)}
    if shards is None or drawn or encodes:
        model.to(accelerator.device)
        for one in (adapters, under):
            if one is not None:
                one.to(accelerator.device)  # where the layers of blocks do not go
        return shards
    shards.spread(model, adapters, under, objective, run.train)
    return shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run learns from: samples, or prompts and those that guards draw."""

    samples: Sequence[Sample] = ()
    prompts: Sequence[str] = ()
    held: Sequence[str] = ()


def _data(run: Run, objective: Objective) -> Data:
    from visiontune.data.prompts import read_data_prompts
    from visiontune.training import guards

    if run.guards is not None:
        guards.check(run.guards, objective)
    if objective.needs.online:
        prompts, held = parts.guard_prompts(run, read_data_prompts(run.data))
        return Data(prompts=prompts, held=held)
    if run.data.canvas:
        return Data(samples=_canvases(run, objective))
    samples = read(run.data, objective.needs.columns, objective.needs.optional)
    preflight(samples)
    return Data(samples=samples)


def _canvases(run: Run, objective: Objective) -> list[Sample]:
    """Samples of two panels each.

    Raises:
        UserError: the objective learns from more than one picture a row, or has pictures drawn of words alone.
    """
    if objective.needs.columns != ("image",) or objective.draws:
        raise UserError(
            f"data.canvas makes one picture of source and image, and objective={run.objective['name']} needs others: "
            "take denoising"
        )
    samples = read(run.data, ("image", "source"))
    preflight(samples)
    return [on_canvas(sample) for sample in samples]


def _texts(found: Data, previews: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """All that the model is to read, by kinds, with the names by which the user finds it."""
    return {
        "caption": [(sample.id, sample.caption) for sample in found.samples],
        "prompt": [(f"'{shown(prompt)[:80]}'", prompt) for prompt in found.prompts],
        "guards' prompt": [(f"'{shown(prompt)[:80]}'", prompt) for prompt in found.held],
        "preview prompt": [(f"preview.prompts[{i}]", prompt) for i, prompt in enumerate(previews)],
    }


def _check(run: Run, objective: Objective, reward: Any) -> None:
    """What can be refused before a model is opened."""
    from visiontune.training.lending import check_train

    check_train(objective, run.train)
    _check_ranges(run, objective)
    objective.check_reward(reward)
    if run.adapter is None and "confined_words" in objective.facts():
        raise UserError(
            "objective.confine_words is kept in the file of an adapter, and adapter=none writes none: set it to false, "
            "or choose an adapter"
        )
    if run.data.scores and not objective.needs.scores:
        raise UserError(
            f"data.scores are told by denoising, and not by objective={run.objective['name']}: take "
            "objective=denoising, or leave them out"
        )
    if run.data.scores and run.adapter is None:
        _log.warning("data.scores: the model that is written draws the best, and can be asked for nothing else")
    distilled = "distilled_guidance" in objective.facts() and not objective.needs.told
    if distilled and run.preview.prompts and run.preview.cfg_scale != 1:
        _log.warning(
            "preview.cfg_scale=%g guides what learns to do without: set it to 1 to see that", run.preview.cfg_scale
        )
    few = json.loads(objective.facts().get("few_steps", "null"))
    if few and run.preview.prompts and run.preview.steps != few["steps"]:
        _log.warning(
            "preview.steps=%d draws in other steps than what is trained for: set it to %d to see that",
            run.preview.steps,
            few["steps"],
        )


def _check_ranges(run: Run, objective: Objective) -> None:
    """Refuse ranges of noise that the objective does not train at, and a share outside of ranges where there are none.

    Raises:
        UserError: it names the option.
    """
    from visiontune.data.mix import WHOLE
    from visiontune.diffusion.timesteps import Timesteps

    parted = set(run.data.ranges()) != {WHOLE}
    if parted and not objective.needs.ranges:
        raise UserError(
            f"data.timestep_range: objective '{run.objective['name']}' chooses its timesteps itself: take "
            "objective=denoising, or leave it out"
        )
    timesteps = getattr(objective.config, "timesteps", None)
    if not isinstance(timesteps, Timesteps) or not timesteps.global_share:
        return
    if not parted and (timesteps.low, timesteps.high) == WHOLE:
        raise UserError(
            "objective.timesteps.global_share is of rows outside of a range, and all are drawn from the whole "
            "schedule: set timesteps.low or high, or data.timestep_range"
        )


def _check_sizes(run: Run, model: Any, objective: Objective) -> None:
    """Refuse products of options that the model cannot do, before anything is computed.

    Raises:
        UserError: it names the option.
    """
    if not hasattr(model, "check_area"):
        return
    from visiontune.sampling.pipeline import check_batch
    from visiontune.training.trouble import named

    options: Any = getattr(objective, "config", None)
    steps = {name: getattr(options, name) for name in ("steps", "prior_steps") if hasattr(options, name)}
    for name, count in steps.items():
        with named(f"objective.{name}"):
            model.check_steps(count)
    side = run.data.resolution or model.resolution
    wide = 2 * side if run.data.canvas else side
    with named("data.resolution"):
        model.check_area(side, wide)
    with named("train.batch_size"):
        rows = min(getattr(options, "micro_batch", None) or run.train.batch_size, run.train.batch_size)
        check_batch(rows, side, wide)


def _check_dropout(run: Run, model: Any) -> None:
    """Refuse rows without captions that no trained network would see.

    Raises:
        UserError: it names the network.
    """
    from visiontune.training.optim import trains_text
    from visiontune.training.sharding import asked

    apart = getattr(model, "WORDLESS", None)
    if run.data.caption_dropout and apart is not None and asked() is not None:
        raise UserError(
            f"data.caption_dropout: rows without a caption pass the {apart} of '{model.source}', and with FSDP all "
            "processes have to call the same networks: set it to 0"
        )
    if not run.data.caption_dropout or apart is None or trains_text(model, run.train):
        return
    if apart not in model.names(run.train.networks):
        raise UserError(
            f"data.caption_dropout: rows without a caption pass the {apart} of '{model.source}', which is not trained: "
            f"set it to 0, or add {apart} to train.parts"
        )


def _rows(
    run: Run,
    model: Any,
    sets: Sequence[AdapterSet],
    objective: Objective,
    found: Data,
    accelerator: Any,
    cache_dir: Path,
    draw: Callable[..., Any] | None,
    fill: bool,
) -> Any:
    """Batches of prompts, or of encoded samples and what the objective adds to them."""
    from visiontune.data.prompts import PromptBatches
    from visiontune.objectives.base import Tools
    from visiontune.sampling.pipeline import images

    rank, world = accelerator.process_index, accelerator.num_processes
    if objective.needs.online:
        return PromptBatches(found.prompts, run.train.batch_size, objective.group, run.seed, rank, world)
    lent = Tools(reference=lambda: _off(model, sets), draw=draw or images)
    with accelerator.main_process_first():
        prior = objective.prepare(model, run.data, found.samples, cache_dir, lent)
    own = objective.prior_rows(run.train.batch_size)
    return encoded(run, model, sets, [*found.samples, *prior], accelerator, cache_dir, fill, own)


@contextmanager
def _off(model: Any, sets: Sequence[AdapterSet]) -> Iterator[None]:
    """The bare model for a while."""
    from visiontune.ops.skips import as_opened

    with ExitStack() as stack:
        stack.enter_context(as_opened(model.networks().values()))
        for found in sets:
            stack.enter_context(found.disable())
        yield


def encoded(
    run: Run,
    model: Any,
    sets: Sequence[AdapterSet],
    samples: Sequence[Sample],
    accelerator: Any,
    cache_dir: Path,
    fill: bool,
    prior_rows: int | None = None,
) -> BatchSampler:
    """Batches of encoded samples, with so many prior rows each; with ``fill`` all are encoded now.

    What a set makes of the text encoders is no property of the base, so captions are left to the steps then.
    """
    from visiontune.data.loader import BatchSampler
    from visiontune.data.pixel_rows import PixelRows
    from visiontune.data.rows import Rows
    from visiontune.models.contrastive import ContrastiveModel
    from visiontune.training.optim import trains_text

    rank, world = accelerator.process_index, accelerator.num_processes
    if isinstance(model, ContrastiveModel):
        pixels = PixelRows(samples, run.data, model.resolution)
        return BatchSampler(pixels, run.train.batch_size, run.seed, rank, world, ahead=True)

    reached = {name.partition(".")[0] for found in sets for name in found.base_layers()}
    live = trains_text(model, run.train) or bool(reached & {*model.roles().get("text", ())})
    rows = Rows(model, samples, run.data, cache_dir, live)
    if fill:
        rows.fill(rank, world)
        accelerator.wait_for_everyone()
    return BatchSampler(rows, run.train.batch_size, run.seed, rank, world, prior_rows=prior_rows, ahead=True)


def _plan(run: Run, model: Model, adapters: Any, objective: Any, rows: Any, accelerator: Any) -> None:
    from visiontune.training import plan

    plan.plan(
        run.folder / folder.PLAN,
        model=model,
        adapters=adapters,
        objective=objective,
        rows=rows,
        seed=run.seed,
        accelerator=accelerator,
        again=folder.begun(run),
    )
