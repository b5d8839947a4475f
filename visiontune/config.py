"""Recipes: YAML and dotted overrides become one typed :class:`Run` (or sampling) object. Reading one never trains.

A recipe is a mapping with ``verb`` (``train`` or ``sample``) and ``description``; the rest are the options of
:class:`Run` or of :class:`visiontune.sampling.config.SampleConfig`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from visiontune import catalogue, outside, plugin
from visiontune.data.base import Config as DataConfig
from visiontune.data.readers import resolve
from visiontune.errors import UserError
from visiontune.outside import shown
from visiontune.sampling.config import GridConfig, KeepConfig, SampleConfig
from visiontune.schema import convert, from_mapping, option, structure
from visiontune.training.config import GuardsConfig, JudgeConfig, PreviewConfig, TrainConfig

Dtype = Literal["fp32", "bf16", "fp16"]

# More dots than the path of any option has.
_DEEPEST = 20
# Files that every adapter may be given, beside its options.
_FILES = {"start": "the adapter.safetensors of a run", "under": "an adapter file, the folder of a run, or one of PEFT"}
# The option that a bare value of a section stands for: `adapter: oft` is `adapter: {name: oft}`.
_SHORTHANDS = {"model": "source", "data": "root", "adapter": "name", "objective": "name", "reward": "name"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model; a bare value is its source."""

    SHORTHAND: ClassVar[str] = "source"

    source: str = option("pocket/sd", help="pocket/sd, a local diffusers folder or a Hub id")
    revision: str | None = option(None, help="branch, tag or commit of a Hub model")
    variant: str | None = option(
        None, help="files of weights to read, fp16 for *.fp16.safetensors; null: the plain ones, or the only variant"
    )
    dtype: Dtype = option("fp32", help="number format of the frozen weights; full fine-tuning needs fp32")
    quantize: Literal["int8", "fp8", "nf4"] | None = option(
        None, help="store the denoiser's linear layers in 8 or 4 bits"
    )
    quantize_rank: int = option(
        0, least=0, greatest=16384, help="rank of the part of the codes' error that is kept beside them; 0 keeps none"
    )
    attention: Literal["auto", "native", "flash", "flash3", "cudnn", "xformers", "sage", "flex"] = option(
        "native", help="what computes the denoiser's attention; auto: the fastest that is right, by trial"
    )
    compile: bool = option(False, help="compile the blocks that the denoiser repeats")
    offload: Literal["block"] | None = option(
        None, help="block: keep the denoiser's frozen blocks in main memory, on the device one at a time"
    )
    expand: Literal["paint", "edit"] | None = option(
        None,
        help="give a text-to-image UNet the input channels of a model that paints into pictures, or that edits them; "
        "for training all weights: write one by `visiontune expand` to train an adapter on it",
    )
    skips: float | None = option(
        None,
        least=0.5,
        greatest=1,
        help="kappa of ScaleLong, which weakens long skips of UNets; null: the checkpoint's",
    )
    vae_tiling: bool = option(False, help="let the VAE work on large pictures in tiles: less memory, seams smoothed")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run, whole: what ``runs/<name>/recipe.yaml`` holds.

    ``adapter`` and ``objective`` are validated and hold every option of the method they name; ``adapter`` is ``None``
    when all weights are trained (``adapter: none`` in a recipe), and may have two files: the ``start`` of its training,
    and what lies ``under`` it meanwhile.
    """

    name: str = option(help="name of the run; it writes to <out>/<name>")
    out: str = option("runs", help="folder that holds the runs")
    seed: int = option(0, least=0, greatest=2**32 - 1, help="seed of everything random in the run")
    description: str = option("", help="one line for the catalogue and the model card")
    model: ModelConfig = option(ModelConfig(), help="the base model")
    adapter: dict[str, Any] | None = option(
        help="adapter name, targets, start (a trained file), under (an assistant's file) and options; none trains all "
        "weights"
    )
    objective: dict[str, Any] = option({"name": "denoising"}, help="objective name and options")
    reward: dict[str, Any] | None = option(None, help="what pictures are scored by: a reward's name, and its options")
    data: DataConfig = option(help="the images and captions, or a file of prompts")
    train: TrainConfig = option(TrainConfig(), help="optimisation")
    preview: PreviewConfig = option(PreviewConfig(), help="images drawn during training")
    guards: GuardsConfig | None = option(None, help="alarms for training by reward; none for none")
    judge: JudgeConfig | None = option(None, help="a look at what was learnt and kept when the run ends; none for none")

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return outside.expanded(self.out, "folder") / self.name

    @property
    def cache(self) -> Path:
        """Where latents, text features and prior pictures are kept, for all runs beside this one."""
        return outside.expanded(self.out, "folder") / ".cache"

    def resolved(self) -> dict[str, Any]:
        """The recipe with every option spelt out; :func:`load_run` reads it back to an equal run."""
        content = _plain(dataclasses.asdict(self))
        return {"verb": "train", **content, "adapter": content["adapter"] or "none"}


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """A ``rewards/*.yaml`` file: a reward module with its options, and what one must know before using it."""

    name: str = option(help="reward module, dotted path or .py file")
    description: str = option("", help="one line for the catalogue's table")
    options: dict[str, Any] = option({}, help="options of the module")
    licence: str = option(help="licence of the model's weights")
    range: tuple[float, float] = option(least=-math.inf, greatest=math.inf, help="least and greatest score")
    differentiable: bool = option(help="whether gradients reach the pixels")


def sections() -> dict[str, type]:
    """The sections of a recipe that have options of their own, and whole recipes of both verbs."""
    parts = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "preview": PreviewConfig}
    parts |= {"guards": GuardsConfig, "judge": JudgeConfig}
    return {"run": Run, **parts, "sample": SampleConfig, "grid": GridConfig, "keep": KeepConfig}


# ---------------------------------------------------------------------------------------------------- reading


def load_run(recipe: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read and validate a training recipe.

    Args:
        recipe: catalogue name (``personalise/oft``) or path of a YAML file.
        overrides: ``"train.steps=200"`` and the like.

    Raises:
        UserError: no such recipe, or an option that is unknown or ill-typed; the message has its dotted path.
    """
    return parse_run(_read(recipe, "train", overrides))


def parse_run(content: Mapping[str, Any]) -> Run:
    """A run from the content of a recipe; see :func:`load_run`."""
    content = dict(content)
    if content.get("adapter") in ("none", {"name": "none"}):
        content["adapter"] = None
    for section in ("reward", "guards", "judge"):
        if content.get(section) == "none":
            content[section] = None
    for section in ("adapter", "objective", "reward"):
        if isinstance(content.get(section), str):
            content[section] = {"name": content[section]}
    run = from_mapping(Run, content)
    if not Path(run.name).parts or Path(run.name).is_absolute() or ".." in Path(run.name).parts:
        raise UserError(f"name '{run.name}' cannot be a folder inside '{run.out}': give a plain name")
    outside.target(Path(run.out) / run.name, "the run's folder (out and name)")
    if run.model.quantize and run.adapter is None:
        raise UserError("model.quantize keeps weights frozen, and adapter=none trains them all: choose an adapter")
    if run.train.trigger and run.adapter is None:
        raise UserError(
            "train.parts has trigger, which is trained beside an adapter: choose one, or set "
            "train.parts=[denoiser, text], which trains all embeddings"
        )
    if run.model.quantize_rank and not run.model.quantize:
        raise UserError("model.quantize_rank keeps part of what codes lose: set model.quantize to nf4, fp8 or int8")
    if run.model.compile and run.model.attention != "native":
        raise UserError(
            f"model.compile traces what model.attention={run.model.attention} chooses while it runs: take one of them"
        )
    objective = _spelt_out("objectives", run.objective, "objective")
    return dataclasses.replace(run, adapter=_adapter(run.adapter), objective=objective, data=resolve(run.data))


def load_sample(recipe: str | Path, overrides: Sequence[str] = ()) -> SampleConfig:
    """Read and validate a sampling recipe; arguments and errors are those of :func:`load_run`."""
    content = _read(recipe, "sample", overrides)
    content.pop("description", None)
    config = from_mapping(SampleConfig, content)
    outside.target(config.out, "the folder (out)")
    return config


def load_reward_spec(name: str) -> RewardSpec:
    """A reward of the catalogue, its options validated against its module."""
    spec = from_mapping(RewardSpec, catalogue.load("rewards", name))
    plugin.configure("rewards", {**spec.options, "name": spec.name}, "options")
    return spec


def apply(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``content`` with dotted overrides put in, whose values stay text; bare values on the way become sections.

    What a text means is up to the option's type: see :func:`visiontune.schema.convert`. Only ``null`` is nothing, and a
    pair of quotes around the whole, which a shell left, is taken off.

    >>> apply({"adapter": "oft"}, ["adapter.block_size=16", "train.lr=1e-3"])
    {'adapter': {'name': 'oft', 'block_size': '16'}, 'train': {'lr': '1e-3'}}
    """
    result = dict(content)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or len(keys) > _DEEPEST:
            raise UserError(f"'{shown(override)}' is not an override: write option=value, e.g. train.steps=200")
        section = result
        for key in keys[:-1]:
            inner = structure(section.get(key))
            if not isinstance(inner, Mapping):
                inner = {_SHORTHANDS[key]: inner} if inner is not None and key in _SHORTHANDS else {}
            section[key] = dict(inner)
            section = section[key]
        section[keys[-1]] = _value(text)
        if keys[-1] in _SHORTHANDS:
            section[keys[-1]] = structure(section[keys[-1]])
    return result


def _value(text: str) -> str | None:
    """The right-hand side of an override."""
    if text == "null":
        return None
    quote = text[:1]
    quoted = quote in ("'", '"') and len(text) > 1 and text.count(quote) == 2 and text.endswith(quote)
    return text[1:-1] if quoted else text


def _read(recipe: str | Path, verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    is_path = Path(recipe).suffix in (".yaml", ".yml") or os.path.isfile(recipe)
    content = catalogue.read_recipe(recipe if is_path else catalogue.find("pipelines", str(recipe)))
    for_verb = content.pop("verb", "train")
    if for_verb != verb:
        raise UserError(f"{recipe} is a recipe for another verb: run `visiontune {for_verb} {recipe}`")
    return apply(content, overrides)


def _adapter(spec: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    method = {key: value for key, value in spec.items() if key not in ("targets", *_FILES)}
    try:
        targets = convert(str | list[str], spec.get("targets", "attention"), "adapter.targets")
    except UserError as error:
        raise UserError(f"{error}: name a preset, a pattern or a list of patterns") from error
    options = _spelt_out("adapters", method, "adapter")
    files = {}
    for key, what in _FILES.items():
        file = spec.get(key)
        if file is not None and not isinstance(file, (str, Path)):
            raise UserError(f"adapter.{key} must be {what}, not {file!r}")
        if file not in (None, "", "none"):
            files[key] = str(file)
    return {"name": options.pop("name"), "targets": targets, **files, **options}


def _spelt_out(kind: str, spec: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The name and every option of a method, defaults included."""
    _, config = plugin.configure(kind, spec, path)
    return {"name": spec["name"], **_plain(dataclasses.asdict(config))}


def _plain(value: Any) -> Any:
    """Only what YAML's safe form can hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
