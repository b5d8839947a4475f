"""The parts that a recipe names, opened: model, adapter, data, reward and guard."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from visiontune import plugin
from visiontune.adapters import read_header
from visiontune.config import Run
from visiontune.data.base import listed, substitute
from visiontune.errors import UserError

if TYPE_CHECKING:
    from visiontune.adapters.base import AdapterSet
    from visiontune.models.base import Model
    from visiontune.objectives.base import Objective


def open_objective(run: Run) -> Objective:
    """The run's objective.

    Raises:
        UserError: it is unknown, an option does not fit, or its module builds something else.
    """
    from visiontune.objectives.base import Needs, Objective

    module, config = plugin.configure("objectives", run.objective, "objective")
    built = plugin.build(module, config, "objective")
    if not isinstance(built, Objective) or not isinstance(built.needs, Needs):
        raise UserError(
            f"objective '{run.objective['name']}' built a {type(built).__name__}: its build(config) must return a "
            "Supervised or Online of visiontune.objectives.base, whose needs are Needs"
        )
    return built


def load_reward(run: Run, objective: Objective) -> Any:
    """The run's reward, or ``None``.

    Raises:
        UserError: it is unknown, its weights are not there, or the objective reads no reward.
    """
    if run.reward is None:
        return None
    if not objective.needs.reward:
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


def make_guard(run: Run, prompts: Sequence[str], objective: Objective) -> Any:
    """The run's guard, or ``None``.

    Raises:
        UserError: its reward is unknown, or is scaled by what it has seen and cannot be compared with the start.
    """
    if run.guards is None:
        return None
    from visiontune.rewards.loading import load, resolve
    from visiontune.training.guards import Guard

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


def open_model(run: Run, fetch: bool = True) -> Model:
    """The run's base model, on the CPU; without ``fetch`` one that is on this machine."""
    import torch

    from visiontune import models

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    spec = run.model
    return models.load(
        spec.source,
        dtype=dtypes[spec.dtype],
        revision=spec.revision,
        variant=spec.variant,
        quantize=spec.quantize,
        quantize_rank=spec.quantize_rank,
        fetch=fetch,
    )


def attach_adapter(run: Run, model: Model) -> AdapterSet | None:
    """Attach the run's adapter, as its ``start`` was trained, to the networks that are trained."""
    if run.adapter is None:
        return None
    from visiontune import adapters
    from visiontune.models.words import rows_of

    targets = run.adapter["targets"]
    _, config = plugin.configure("adapters", _without(run.adapter, "targets", "start"), "adapter")
    trained = model.names(run.train.networks)
    words = rows_of(model, run.data.trigger, run.data.class_noun or "") if run.train.trigger else {}
    try:
        made = adapters.attach(model.of(*trained), config, targets=targets, presets=model.presets(trained), words=words)
        if "start" in run.adapter:
            adapters.start(made, run.adapter["start"])
        return made
    except UserError as error:
        raise UserError(f"adapter: {error}") from error


def passed_over(run: Run, model: Model) -> list[str]:
    """Lines on the layers that ``adapter.targets`` name and the adapter does not take."""
    if run.adapter is None:
        return []
    from visiontune.adapters import _targets

    trained = model.names(run.train.networks)
    method = plugin.load("adapters", run.adapter["name"])
    layers = _targets.passed_over(model.of(*trained), run.adapter["targets"], method.LAYERS, model.presets(trained))
    name = run.adapter["name"]
    return [
        f"passed over: {len(names)} {kind} that {name} does not adapt: {listed(names, 4)}"
        for kind, names in layers.items()
    ]


def check_start(run: Run) -> None:
    """Refuse a start of the adapter that is no adapter file, without opening the model."""
    if run.adapter is None or "start" not in run.adapter:
        return
    try:
        read_header(run.adapter["start"])
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
        "resolution": str(run.data.resolution) if run.data.resolution else None,
        "start": (run.adapter or {}).get("start"),
        "modelspec.title": run.name,
        "modelspec.trigger_phrase": run.data.trigger,
    }
    return {name: value for name, value in facts.items() if value}


def _without(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}
