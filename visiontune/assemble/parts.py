"""The parts that a recipe names, opened: model, adapter, data, reward and guard."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune import outside, plugin
from visiontune.adapters import read_header
from visiontune.adapters._header import is_own
from visiontune.assemble import resources
from visiontune.config import Run
from visiontune.data.base import listed, substitute
from visiontune.errors import UserError

if TYPE_CHECKING:
    from visiontune.adapters.base import AdapterSet
    from visiontune.models.base import Model
    from visiontune.models.expand import Purpose
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


def check_shards(run: Run) -> None:
    """Refuse what cannot be done on sharded networks, where accelerate's configuration asks for FSDP.

    Raises:
        UserError: naming what to change.
    """
    from visiontune.training import sharding

    if sharding.asked() is None:
        return
    sharding.check_objective(open_objective(run))
    if run.adapter is not None:
        _, config = plugin.configure("adapters", _without(run.adapter, "targets", "start", "under"), "adapter")
        sharding.check_adapter(config, run.adapter["name"])
    if run.model.quantize is not None:
        raise UserError("FSDP: quantised weights are not sharded: leave model.quantize out, or start without FSDP")
    if run.model.offload is not None:
        raise UserError("FSDP: blocks that leave the device are not sharded: leave model.offload out")
    if run.model.compile:
        raise UserError("FSDP: compiled blocks were not tried on parts of weights: set model.compile to false")
    if run.judge is not None:
        raise UserError(
            "judge looks at a run in one process, and FSDP needs all of them: set judge=none (a finished adapter is "
            "judged by visiontune evaluate)"
        )


def check_offload(run: Run) -> None:
    """Refuse what cannot be done while the blocks of the base are not on the device, before the model is opened.

    Raises:
        UserError: naming what to change.
    """
    from visiontune.adapters.base import whole_base

    if run.model.offload is None:
        return
    if run.adapter is None:
        raise UserError("model.offload is for frozen weights, and adapter=none trains them all: choose an adapter")
    if not run.train.gradient_checkpointing:
        raise UserError(
            "model.offload saves nothing where the backward pass keeps the weights of the forward pass: set "
            "train.gradient_checkpointing=true"
        )
    if run.model.compile:
        raise UserError("model.offload gives blocks other weights at every call: set model.compile to false")
    if run.model.quantize == "nf4":
        raise UserError("model.offload does not move codes of bitsandbytes: set model.quantize to int8 or fp8")
    name = run.adapter["name"]
    _, config = plugin.configure("adapters", _without(run.adapter, "targets", "start", "under"), "adapter")
    if why := whole_base(config):
        raise UserError(f"model.offload: adapter '{name}' {why}, which are not on the device then: take lora")


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
    drawn = {name: options[name] for name in ("steps", "cfg_scale", "guidance") if name in options}
    return Guard(run.guards, prompts, reward=reward, **drawn)


def _configured(spec: str | Mapping[str, Any]) -> tuple[str, Any]:
    module, config = plugin.configure("rewards", spec, "reward")
    return module.__name__, config


def open_model(run: Run, fetch: bool = True) -> Model:
    """The run's base model, on the CPU; without ``fetch`` one that is on this machine.

    Raises:
        UserError: it cannot be opened.
    """
    import torch

    from visiontune import models

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    spec = run.model
    model = models.load(
        spec.source,
        dtype=dtypes[spec.dtype],
        revision=spec.revision,
        variant=spec.variant,
        quantize=spec.quantize,
        quantize_rank=spec.quantize_rank,
        skips=spec.skips,
        fetch=fetch,
    )
    if spec.expand is not None:
        model = _expanded(model, spec.expand, run)
    if spec.vae_tiling:
        resources.tile(model)
    return model


def _expanded(model: Any, purpose: Purpose, run: Run) -> Model:
    """The model with the input channels of one that reads pictures.

    Raises:
        UserError: an adapter is to be trained on it, whose file would be of no model that is there.
    """
    from visiontune.models.expand import expand_input

    if run.adapter is not None:
        raise UserError(
            "model.expand is for training all weights (adapter=none): write the model first, by `visiontune expand "
            f"{run.model.source} FOLDER --for {purpose}`, and train the adapter on that folder"
        )
    made: Model = expand_input(model, purpose)
    return made


def attach_adapter(run: Run, model: Model, objective: Objective) -> AdapterSet | None:
    """Attach the run's adapter, as its ``start`` was trained, to the networks that are trained.

    A denoiser that learns to be told a scale of guidance gets the layers that tell it, which are trained as a whole.
    """
    whole = _embed_guidance(run, model, objective)
    if run.adapter is None:
        return None
    from visiontune import adapters
    from visiontune.models.words import rows_of_each

    targets = run.adapter["targets"]
    _, config = plugin.configure("adapters", _without(run.adapter, "targets", "start", "under"), "adapter")
    trained = model.names(run.train.networks)
    presets = model.presets(trained)
    subjects = {one.trigger: one.class_noun or "" for one in run.data.each()}
    words = rows_of_each(model, subjects) if run.train.trigger else {}
    try:
        made = adapters.attach(model.of(*trained), config, targets=targets, presets=presets, words=words, whole=whole)
        if "start" in run.adapter:
            adapters.start(made, run.adapter["start"])
        return made
    except UserError as error:
        raise UserError(f"adapter: {error}") from error


def _embed_guidance(run: Run, model: Any, objective: Objective) -> dict[str, Any]:
    """The layers by which the objective, or the adapter's ``start``, tells the denoiser a scale of guidance."""
    start = (run.adapter or {}).get("start")
    if not objective.needs.told and not (start and read_header(start)["whole"]):
        return {}
    layers: dict[str, Any] = model.embed_guidance()
    return layers


def attach_under(run: Run, model: Model) -> AdapterSet | None:
    """Attach what is to lie under the run's adapter in its steps: frozen, in evaluation mode, at strength 1.

    The model counts as one that is not distilled then: that is what an assistant is for.

    Raises:
        UserError: the file cannot be read, is of another base, or changes what pictures are encoded by.
    """
    if run.adapter is None or "under" not in run.adapter:
        return None
    from visiontune.weights.reading import read

    try:
        made = read(_under(run.adapter["under"]), model.networks(), model.family, model.names()[0], "under")
        reached = {name.partition(".")[0] for name in made.base_layers()}
        if strange := reached - {*model.names(), *model.roles().get("text", ())}:
            raise UserError(
                f"{run.adapter['under']} changes {min(strange)}, and what is encoded once serves all runs: give one of "
                "the denoiser and the text encoders alone"
            )
    except UserError as error:
        raise UserError(f"adapter.under: {error}") from error
    model.distilled = None
    return made.requires_grad_(False)


def _under(name: str) -> Path:
    """A folder that PEFT saved, a file, or that of a run's folder; what it says of itself is whole."""
    from visiontune.sampling.sources import adapter_file

    if outside.is_folder(name) and (outside.expanded(name) / "adapter_config.json").is_file():
        return outside.expanded(name)
    file = adapter_file(name)
    if is_own(file):
        read_header(file)
    return file


def told_under(run: Run, under: AdapterSet | None) -> list[str]:
    """A line on what lies under the run's adapter."""
    if run.adapter is None or under is None:
        return []
    return [
        f"under the adapter in every step: {run.adapter['under']} ({under.method} on {len(under.layers)} layers); "
        "pictures and the result are without it"
    ]


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


def check_files(run: Run, objective: Objective) -> None:
    """Refuse a start of the adapter that is no adapter file, or an assistant, without opening the model."""
    for key, read in (("start", read_header), ("under", _under)):
        if run.adapter is None or key not in run.adapter:
            continue
        try:
            read(run.adapter[key])
        except UserError as error:
            raise UserError(f"adapter.{key}: {error}") from error
    if run.adapter is not None and "under" in run.adapter:
        _check_under(_under(run.adapter["under"]), objective)
    # Without a reference, the teacher is what the run starts from.
    inside = "distilled_guidance" in _of_start(run)
    if inside and "distilled_guidance" in objective.facts() and not objective.needs.reference:
        raise UserError("adapter.start has guidance distilled into it already: set objective.cfg_scale to 1")


def _check_under(under: Path, objective: Objective) -> None:
    """Refuse an assistant with guidance inside where it would be distilled again, or is told."""
    header = read_header(under) if under.is_file() and is_own(under) else {}
    if header.get("whole"):
        raise UserError(
            f"adapter.under: {under} is told its guidance, by layers that the base does not have: write it into a "
            "model (visiontune export --format merged), and name that as model"
        )
    if "distilled_guidance" in header and "distilled_guidance" in objective.facts():
        raise UserError(
            f"adapter.under: {under} has guidance distilled into it already, and would be guided as the teacher: leave "
            "it out, or go on with it as adapter.start"
        )


def in_words(run: Run, text: str) -> str:
    """``text`` with ``[trigger]`` and ``[class]`` put in from the run's data."""
    return substitute(text, run.data.trigger, run.data.class_noun)


def metadata(run: Run, texts: Iterable[str]) -> dict[str, str]:
    """What the header of the trained weights says about the run, besides what the adapter says of itself.

    Args:
        texts: what it learns from; a trigger that is in none of them is nobody's.
    """
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    triggers = [one.trigger for one in run.data.each() if {*re.findall(r"\w+", one.trigger)} <= words]
    facts = {
        "base_model": run.model.source,
        "trigger": run.data.trigger if run.data.trigger in triggers else None,
        "class_noun": run.data.class_noun,
        "prompt": in_words(run, run.data.prompt) if run.data.prompt else None,
        "objective": run.objective["name"],
        "resolution": str(run.data.resolution) if run.data.resolution else None,
        "start": (run.adapter or {}).get("start"),
        "under": (run.adapter or {}).get("under"),
        "canvas": "source, image" if run.data.canvas else None,
        "modelspec.title": run.name,
        "modelspec.trigger_phrase": ", ".join(triggers),
    }
    return {**_of_start(run), **{name: value for name, value in facts.items() if value}}


def _of_start(run: Run) -> dict[str, str]:
    """What the adapter's ``start`` says of how it is drawn, which holds for what is trained on."""
    start = (run.adapter or {}).get("start")
    header = read_header(start) if start else {}
    return {name: header[name] for name in ("distilled_guidance", "few_steps") if name in header}


def _without(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}
