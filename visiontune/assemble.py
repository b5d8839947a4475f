"""From a recipe to a trainer: opens the model, attaches the adapter, reads the data, and puts them together."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune import catalogue, plugin
from visiontune.adapters import read_header
from visiontune.config import Run
from visiontune.data.base import substitute
from visiontune.data.preflight import preflight
from visiontune.data.readers import read
from visiontune.errors import UserError
from visiontune.files import write_text

if TYPE_CHECKING:
    from visiontune.adapters.base import AdapterSet
    from visiontune.data.base import Sample
    from visiontune.data.loader import BatchSampler
    from visiontune.models.base import DiffusionModel
    from visiontune.training.loop import Trainer

RECIPE, PLAN = "recipe.yaml", "plan.safetensors"
# Sections that may change when a run goes on; anything else would make it another run.
_FREE = (
    "description",
    "train",
    "preview",
    *(f"guards.{name}" for name in ("on_alarm", "lr_factor", "reward_drop", "diversity_min", "high_frequency_factor")),
    *(f"guards.{name}" for name in ("blank_max", "distance_max", "change_max", "terms")),
)


def assemble(run: Run) -> Trainer:
    """The trainer of a run, whose ``fit()`` trains it; the resolved recipe is written into the run folder.

    Raises:
        UserError: the folder holds another run, or model, adapter or data are not usable; no recipe is written then.
    """
    check_folder(run)
    trainer = build(run, cache_dir=Path(run.out).expanduser() / ".cache", plan=True)
    if trainer.accelerator.is_main_process:
        write_text(run.folder / RECIPE, dump(run))
    return trainer


def build(
    run: Run, *, cache_dir: Path, images: Callable[..., Any] | None = None, fill: bool = True, plan: bool = False
) -> Trainer:
    """The trainer of a run; nothing is written outside ``cache_dir`` unless ``plan``.

    Args:
        run: from :func:`visiontune.config.load_run`.
        cache_dir: where latents, text features and prior images are kept.
        images: what draws prior images; ``visiontune.sampling.pipeline.images`` unless given.
        fill: encode all data now rather than when it is first drawn.
        plan: let the adapter look at the task; what it decides is kept in the run folder.
    """
    # Cheap mistakes are found first: words and data before the model, which may take minutes to open.
    preview = dataclasses.replace(run.preview, prompts=[in_words(run, prompt) for prompt in run.preview.prompts])
    objective_module, objective_config = plugin.configure("objectives", run.objective, "objective")
    objective = objective_module.build(objective_config)
    from visiontune.data.prompts import PromptBatches, read_data_prompts
    from visiontune.objectives._online import Online
    from visiontune.training import alarms

    online = isinstance(objective, Online)
    prompts = read_data_prompts(run.data) if online else []
    if run.guards is not None:
        alarms.check(run.guards, objective)
    prompts, held = guard_prompts(run, prompts)
    samples = [] if online else read(run.data, ("image", "rejected") if objective.pairs else ("image",))
    if not online:
        preflight(samples)
    check_start(run)
    reward = load_reward(run, online)
    if online:
        from visiontune.training.online import check_train

        check_train(objective, run.train)
        objective.check_reward(reward)
    guard = make_guard(run, held, objective)

    from accelerate.utils import set_seed

    from visiontune.adapters._method import start_follows
    from visiontune.sampling.pipeline import images as stock_images
    from visiontune.training import plan as planning
    from visiontune.training.devices import make_accelerator
    from visiontune.training.loop import Trainer

    model: Any = open_model(run)
    # Some adapters start from random values; everything later draws from generators of its own.
    set_seed(run.seed)
    with start_follows() if plan else nullcontext():
        adapters = attach_adapter(run, model)
    accelerator = make_accelerator(run.train, run.folder)
    model.to(accelerator.device)
    if online:
        rank, world = accelerator.process_index, accelerator.num_processes
        batches: Any = PromptBatches(prompts, run.train.batch_size, objective.group, run.seed, rank, world)
    else:
        with accelerator.main_process_first():
            draw = images or stock_images
            prior = objective.prepare(model, adapters=adapters, data=run.data, cache_dir=cache_dir, images=draw)
        batches = encoded(run, model, [*samples, *prior], accelerator, cache_dir, fill)
    if adapters is not None and adapters.plans and online:
        raise UserError(
            f"adapter '{adapters.method}' looks at a loss on data before training, which objective "
            f"'{run.objective['name']}' does not have: take lora, or start from a trained one (adapter.start)"
        )
    if plan and adapters is not None and adapters.plans:
        planning.plan(
            run.folder / PLAN,
            model=model,
            adapters=adapters,
            objective=objective,
            rows=batches,
            seed=run.seed,
            accelerator=accelerator,
            again=(run.folder / RECIPE).exists(),
        )
    return Trainer(
        model=model,
        adapters=adapters,
        objective=objective,
        rows=batches,
        train=run.train,
        preview=preview,
        out=run.folder,
        seed=run.seed,
        metadata=metadata(run),
        accelerator=accelerator,
        reward=reward,
        guard=guard,
    )


def encoded(
    run: Run, model: Any, samples: Sequence[Sample], accelerator: Any, cache_dir: Path, fill: bool
) -> BatchSampler:
    """Batches of encoded pictures; with ``fill`` all are encoded now."""
    from visiontune.data.loader import BatchSampler
    from visiontune.data.rows import Rows

    rows = Rows(model, samples, run.data, cache_dir, run.train.text_encoder)
    rank, world = accelerator.process_index, accelerator.num_processes
    if fill:
        rows.fill(rank, world)
        accelerator.wait_for_everyone()
    return BatchSampler(rows, run.train.batch_size, run.seed, rank, world)


def load_reward(run: Run, online: bool) -> Any:
    """The run's reward, or ``None``.

    Raises:
        UserError: it is unknown, its weights are not there, or the objective reads no reward.
    """
    if run.reward is None:
        return None
    if not online:
        raise UserError(f"reward: objective '{run.objective['name']}' does not read one; take objective=alignprop")
    from visiontune.rewards.loading import load

    return load(run.reward, "reward")


def guard_prompts(run: Run, prompts: list[str]) -> tuple[list[str], list[str]]:
    """What is trained on, and what guards draw."""
    from visiontune.data.prompts import check_prompts, hold_out

    if run.guards is None:
        return prompts, []
    if run.guards.prompts:
        return prompts, check_prompts([in_words(run, prompt) for prompt in run.guards.prompts], "guards.prompts")
    return hold_out(prompts, run.guards.holdout, run.seed)


def make_guard(run: Run, prompts: list[str], objective: Any) -> Any:
    """The run's guard, or ``None``.

    Raises:
        UserError: its reward is unknown, or is scaled by what it has seen and cannot be compared with the start.
    """
    if run.guards is None:
        return None
    from visiontune.rewards.loading import load, resolve
    from visiontune.training.alarms import Guard

    spec, reward = run.guards.reward, None
    if spec is not None:
        if run.reward and _configured(resolve(spec)) == _configured(resolve(run.reward)):
            warnings.warn(
                "guards.reward is the trained reward, which rises while it is hacked: take another one", stacklevel=2
            )
        reward = load(spec, "guards.reward")
        if getattr(reward, "running", None):
            raise UserError("guards.reward has terms with normalise: running, whose scale moves: take raw or declared")
    options = vars(objective.config)
    drawn = {name: options[name] for name in ("steps", "cfg_scale") if name in options}
    return Guard(run.guards, prompts, reward=reward, **drawn)


def _configured(spec: str | Mapping[str, Any]) -> tuple[str, Any]:
    module, config = plugin.configure("rewards", spec, "reward")
    return module.__name__, config


def open_model(run: Run) -> DiffusionModel:
    """The run's base model, on the CPU."""
    import torch

    from visiontune import models

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    spec = run.model
    return models.load(spec.source, dtype=dtypes[spec.dtype], revision=spec.revision, quantize=spec.quantize)


def attach_adapter(run: Run, model: DiffusionModel) -> AdapterSet | None:
    """Attach the run's adapter, as its ``start`` was trained, to the networks that are trained."""
    if run.adapter is None:
        return None
    from visiontune import adapters

    targets = run.adapter["targets"]
    _, config = plugin.configure("adapters", _without(run.adapter, "targets", "start"), "adapter")
    trained = {True: run.train.text_encoder, False: run.train.denoiser}
    modules = {name: m for name, m in model.components().items() if trained[name in model.text_encoders]}
    try:
        made = adapters.attach(modules, config, targets=targets, presets=model.presets(modules))
        if "start" in run.adapter:
            adapters.start(made, run.adapter["start"])
        return made
    except UserError as error:
        raise UserError(f"adapter: {error}") from error


def check_start(run: Run) -> None:
    """Refuse a start of the adapter that is no adapter file, without opening the model."""
    if run.adapter is None or "start" not in run.adapter:
        return
    try:
        read_header(Path(run.adapter["start"]).expanduser())
    except UserError as error:
        raise UserError(f"adapter.start: {error}") from error


def in_words(run: Run, text: str) -> str:
    """``text`` with ``[trigger]`` and ``[class]`` put in from the run's data."""
    return substitute(text, run.data.trigger, run.data.class_noun)


def metadata(run: Run) -> dict[str, str]:
    """What the header of the trained weights says about the run, besides what the adapter says of itself."""
    facts = {
        "base_model": run.model.source,
        "trigger": run.data.trigger,
        "class_noun": run.data.class_noun,
        "prompt": in_words(run, run.data.prompt) if run.data.prompt else None,
        "objective": run.objective["name"],
        "start": (run.adapter or {}).get("start"),
        "modelspec.title": run.name,
        "modelspec.trigger_phrase": run.data.trigger,
    }
    return {name: value for name, value in facts.items() if value}


def dump(run: Run) -> str:
    """The recipe as YAML, every option spelt out."""
    import yaml

    return yaml.safe_dump(run.resolved(), sort_keys=False, allow_unicode=True, width=120)


def check_folder(run: Run) -> None:
    """Refuse a folder that holds a run already, unless this run is to go on with it and is the same run.

    Raises:
        UserError: names the mend: another name, ``train.resume=true``, or the option that differs.
    """
    file = run.folder / RECIPE
    if run.folder.exists() and not run.folder.is_dir():
        raise UserError(f"{run.folder} is a file: choose another name=")
    if not file.exists():
        return
    if not run.train.resume:
        raise UserError(
            f"{run.folder} already holds a run: choose another name=, or go on with it by train.resume=true"
        )
    before = {key: value for key, value in _flat(catalogue.read_yaml(file)) if not _free(key)}
    now = {key: value for key, value in _flat(run.resolved()) if not _free(key)}
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            was, wanted = before.get(key), now.get(key)
            raise UserError(
                f"{run.folder} holds a run with {key}={was}, not {wanted}: set it back, or choose another name="
            )


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _flat(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _without(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}
