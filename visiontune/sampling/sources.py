"""What a sampling run draws with: the model, its adapters, and the words that the adapters were trained with."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate import PartialState

from visiontune import adapters, models, outside
from visiontune.data import scores
from visiontune.data.base import has_slots, substitute
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.models.low_bits import LowBits
from visiontune.sampling.config import FewSteps, SampleConfig
from visiontune.schema import from_mapping

if TYPE_CHECKING:
    from visiontune.adapters.base import AdapterSet
    from visiontune.models.pipeline import PipelineModel


# Of models that were trained with prompts left out.
DEFAULT_SCALE = 4.0
_log = logging.getLogger(__name__)


def adapter_file(name: str) -> Path:
    """The weights that an adapter option means: a file, or ``adapter.safetensors`` of a run folder.

    Raises:
        UserError: there is no such file, or it is none.
    """
    if not outside.is_folder(name):
        return outside.regular(name, "adapter file or run folder")
    file = Path(name).expanduser() / "adapter.safetensors"
    if not file.is_file():
        raise UserError(f"there is no adapter {file}: give an adapter.safetensors or the folder of a finished run")
    return file


def base_of(config: SampleConfig) -> str:
    """The model that is named, else what the first adapter says it was trained on; without any, the shipped one.

    Raises:
        UserError: the first adapter does not say it.
    """
    if config.model is not None:
        return config.model
    adapter = next(iter(config.adapter_list()), None)
    return "pocket/sd" if adapter is None else trained_on(adapter_file(adapter.file), "model=")


def trained_on(file: Path, option: str) -> str:
    """The model that an adapter file says it was trained on.

    Raises:
        UserError: it says none; the message asks for it by ``option``.
    """
    base = adapters.read_header(file).get("base_model")
    if not base:
        raise UserError(f"{file} does not say what it was trained on: name the base with {option}")
    return base


def settled(config: SampleConfig) -> SampleConfig:
    """The config with a scale, steps and a sampler: what it leaves open is as its adapters were made for.

    Raises:
        UserError: an adapter of few steps does not say how it is to be drawn, or was told other ratings than are asked.
    """
    ratings(config)
    files = [adapter_file(one.file) for one in config.adapter_list()]
    found = next((file for file in files if "few_steps" in adapters.read_header(file)), None)
    made_for = FewSteps() if found is None else _few_steps(found)
    steps, scheduler = config.steps or made_for.steps, config.scheduler or made_for.scheduler
    if found is not None and (steps, scheduler) != (made_for.steps, made_for.scheduler):
        _log.warning(
            "%s was made for %d steps of %s, not %d of %s: leave steps and scheduler out",
            found,
            made_for.steps,
            made_for.scheduler,
            steps,
            scheduler,
        )
    return replace(config, cfg_scale=scale_of(config), steps=steps, scheduler=scheduler)


def _few_steps(file: Path) -> FewSteps:
    told = adapters.read_header(file)["few_steps"]
    try:
        return from_mapping(FewSteps, json.loads(told), f"{file}: few_steps")
    except ValueError as error:
        raise UserError(f"{file}: few_steps is '{told[:80]}', which is no JSON: train it again") from error


def ratings(config: SampleConfig) -> list[float | None]:
    """The ratings that are asked for, as shares from the worst to the best; none where no adapter was told any.

    Raises:
        UserError: one that no adapter was told, or a number outside of its range.
    """
    headers = [adapters.read_header(adapter_file(one.file)) for one in config.adapter_list()]
    ranges: scores.Ranges = next((header["scores"] for header in headers if header["scores"]), {})
    return scores.asked(config.scores, ranges)


def skips_of(files: Sequence[Path]) -> float | None:
    """Kappa of the long skips that adapters were trained with; None where none says one, which the model decides then.

    Raises:
        UserError: one of them is no adapter file.
    """
    return next((kappa for file in files if (kappa := adapters.read_header(file)["skips"]) != 1), None)


def scale_of(config: SampleConfig) -> float:
    """The scale of classifier-free guidance; guidance that an adapter has inside is not added again unasked."""
    files = [adapter_file(one.file) for one in config.adapter_list()]
    found = next((file for file in files if "distilled_guidance" in adapters.read_header(file)), None)
    stack = GuidanceStack.of_options(config)
    based = stack is not None and stack.base is not None
    learnt = None if found is None else _strengths(found)
    if found is not None and (based or (learnt is None and config.cfg_scale not in (None, 1))):
        _log.warning(
            "%s has guidance distilled into it (%s), and is guided again: leave cfg_scale and guidance out",
            found,
            adapters.read_header(found)["distilled_guidance"],
        )
    if learnt is not None and config.cfg_scale is not None and not learnt[0] <= config.cfg_scale <= learnt[1]:
        _log.warning(
            "%s was taught strengths of guidance from %g to %g, and cfg_scale=%g is none of them",
            found,
            *learnt,
            config.cfg_scale,
        )
    if config.cfg_scale is not None:
        return config.cfg_scale
    if learnt is not None:
        return min(max(DEFAULT_SCALE, learnt[0]), learnt[1])
    return DEFAULT_SCALE if found is None or based else 1.0


def _strengths(file: Path) -> tuple[float, float] | None:
    """The least and the greatest strength that a student is told, if it is told any.

    Raises:
        UserError: the file says it in a way that visiontune does not.
    """
    header = adapters.read_header(file)
    if not header["tells_guidance"]:
        return None
    said = outside.parse_json(header["distilled_guidance"], f"'distilled_guidance' of '{file}'")
    match said:
        case {"w": [int() | float() as least, int() | float() as most]}:
            return float(least), float(most)
    raise UserError(f"{file} does not say what strengths of guidance it was taught: copy or train it again")


def substituted(prompts: list[str], config: SampleConfig) -> list[str]:
    """Prompts with ``[trigger]`` and ``[class]`` replaced by the words that the first adapter was trained with."""
    if not any(map(has_slots, prompts)):
        return prompts
    header: dict[str, str] = {}
    for one in reversed(config.adapter_list()):
        header |= adapters.read_header(adapter_file(one.file))
    mend = "give an adapter that says what it stands for, or write the word itself"
    return [substitute(prompt, header.get("trigger"), header.get("class_noun"), mend=mend) for prompt in prompts]


class Bench:
    """The model that is drawn with, and the adapters on it: what one cell leaves is not loaded again for the next.

    Args:
        state: the processes. model: one to use in place of those that are named, with its adapters attached.
    """

    def __init__(self, state: PartialState, model: PipelineModel | None = None) -> None:
        self._state, self._given = state, model
        self._model = model
        self._opened: object = None
        self._made_room = False
        self._sets: list[AdapterSet] = []
        self._files: list[Path] = []
        self._undo: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._take_off()

    @property
    def opened(self) -> object:
        """What tells the model that is open from others."""
        return self._opened

    def at(self, config: SampleConfig) -> PipelineModel:
        """The model with the configured adapters attached, each at its strength."""
        source = None if self._given else _weights_of(config)
        if self._model is None or source != self._opened:
            self._take_off()
            if self._model is not None:
                self._model = None
                gc.collect()  # its memory is that of the next
            self._model, self._opened = self._load(config), source
        own = config.adapter_list()
        wanted = [adapter_file(one.file) for one in own]
        if wanted != self._files:
            self._take_off()
            headers = [adapters.read_header(file) for file in wanted]
            if not config.canvas and any("canvas" in header for header in headers):
                raise UserError(
                    "the adapter was trained on canvases of two panels: set canvas=true, and name a picture"
                )
            if any("coupled" in header for header in headers):
                self._undo = _coupled(self._model)
            if any("confined_words" in header for header in headers):
                self._undo = _confined(self._model)
            for i, (file, header) in enumerate(zip(wanted, headers, strict=True)):
                named = {"name": f"sample{i}", "trust": config.trust}
                if header["whole"] or header["scores"]:
                    self._made_room = True  # what was there before stays, whatever is dropped
                    self._model.accept(header)
                self._sets.append(adapters.load(self._model.networks(), file, **named))
            self._files = wanted
        for one, attached in zip(own, self._sets, strict=True):
            attached.scale = config.adapter_scale * one.scale
        if asked := ratings(config):
            self._model.ask(asked)
        return self._model

    def _load(self, config: SampleConfig) -> PipelineModel:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype]
        # Each process has a device of its own, which a bare "cuda" must not override.
        device = str(self._state.device) if config.device in ("auto", self._state.device.type) else config.device
        model: PipelineModel = models.load(
            base_of(config),
            dtype=dtype,
            revision=config.revision,
            variant=config.variant,
            device=device,
            # What a file names is not fetched unasked.
            fetch=config.model is not None,
            skips=_skips(config),
        )
        if config.low_bits is not None:
            LowBits.load(model, config.low_bits)
        return model

    def _take_off(self) -> None:
        for adapter_set in reversed(self._sets):
            adapter_set.detach()
        if self._undo is not None:
            self._undo()
            self._undo = None
        if self._made_room and self._model is not None:
            self._model.drop_guidance()
            self._model.drop_scores()
            self._made_room = False
        self._sets, self._files = [], []


def _confined(model: Any) -> Callable[[], None]:
    """Have words act where the model paints alone, as an adapter was trained; gives what undoes it.

    Raises:
        UserError: the model does not paint, or has no layers for it.
    """
    if not model.reads.mask or not hasattr(model, "confine_words"):
        raise UserError(
            f"the adapter was trained with words that act where a model paints, and '{model.source}' is none that it "
            "could be on: leave model out, or name the inpainting model that it was trained on"
        )
    undo: Callable[[], None] = model.confine_words()
    return undo


def _weights_of(config: SampleConfig) -> tuple[Any, ...]:
    """What decides the weights that are loaded."""
    return (base_of(config), config.revision, config.variant, _skips(config), config.low_bits)


def _coupled(model: Any) -> Callable[[], None]:
    """Have the model draw sets, as an adapter was trained; gives what undoes it.

    Raises:
        UserError: the model does not paint, or has no layers for it.
    """
    if not hasattr(model, "couple"):
        raise UserError(
            f"the adapter was trained on sets of pictures, and '{model.source}' is none that it could be on: leave "
            "model out, or name the inpainting model that it was trained on"
        )
    model.couple()
    undo: Callable[[], None] = model.uncouple
    return undo


def _skips(config: SampleConfig) -> float | None:
    return skips_of([adapter_file(one.file) for one in config.adapter_list()])
