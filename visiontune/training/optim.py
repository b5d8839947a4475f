"""Which parameters are trained, and by which optimiser."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from visiontune import plugin
from visiontune.errors import UserError
from visiontune.schema import convert, nearest, spelt
from visiontune.training.config import TRIGGER, TrainConfig

if TYPE_CHECKING:
    from visiontune.models.base import Model

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "sgd": "torch.optim.SGD",
    "adafactor": "transformers.optimization.Adafactor",
    "galore": "pytorch_optimizer.GaLore",
    "natural_galore": "visiontune.training.natural_galore.NaturalGaLore",
}
# The first takes all four or none, the second projects where there is a rank; the values are the paper's for
# fine-tuning, but for the rank.
_MATRIX_DEFAULTS: dict[str, dict[str, Any]] = {
    "pytorch_optimizer.GaLore": {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"},
    "visiontune.training.natural_galore.NaturalGaLore": {"rank": 128},
}
_CLOSED = ("torch", "transformers", "visiontune")


def choose(model: Model, adapters: Any, parts: Sequence[str] | None) -> dict[str, Parameter]:
    """Freeze the model and return what is trained, by name: the parameters of the adapters, or the networks' own.

    Args:
        parts: ``train.parts``; names start with the network that they belong to, after ``adapters.`` for adapters.

    Raises:
        UserError: an unknown part, or one in which the adapter has no layer; trained weights that are not float32.
    """
    trained = model.names(parts)
    for network in model.networks().values():
        network.requires_grad_(False)
    if adapters is not None:
        everything = {f"adapters.{name}": p for name, p in adapters.named_parameters() if p.requires_grad}
        adapters.requires_grad_(False)
        if strange := {network_of(name) for name in everything} - {*model.networks(), TRIGGER}:
            raise UserError(
                f"the adapter is attached to '{min(strange)}', which is no network of '{model.source}': attach it to "
                "model.of(...), under the networks' own names"
            )
        chosen = {name: p for name, p in everything.items() if network_of(name) in {*trained, TRIGGER}}
    else:
        chosen = {f"{part}.{name}": p for part in trained for name, p in model.networks()[part].named_parameters()}
    used = {network_of(name) for name in chosen}
    for part in parts if parts is not None else [None]:
        if not used & set(model.names(None if part is None else [part])):
            where = f"train.parts has '{part}', but the adapter has no layer in it" if part else "it has no parameters"
            raise UserError(f"there is nothing to train: {where}; look at adapter.targets")
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    if any(p.dtype != torch.float32 for p in chosen.values()):
        raise UserError("trained weights must be float32: set model.dtype=fp32 and train.precision=bf16 instead")
    return chosen


def network_of(name: str) -> str:
    """The network that a trained parameter belongs to, or the part ``trigger``."""
    plain = name.removeprefix("adapters.")
    if plain == name:
        return plain.partition(".")[0]
    return TRIGGER if plain.startswith("words.") else plain.removeprefix("whole.").partition(".")[0]


def trains_text(model: Model, train: TrainConfig) -> bool:
    """Whether what the text encoders give changes in training."""
    return train.trigger or bool({*model.names(train.networks)} & {*model.roles().get("text", ())})


def rates(model: Model, train: TrainConfig) -> dict[str, tuple[str, float]]:
    """For each network the group of parameters that it is in, and its learning rate.

    Networks of one role share a group, but for those that ``train.part_lr`` names.

    Raises:
        UserError: a rate for a part that the model does not have, or that is not trained.
    """
    trained = model.names(train.networks)
    for part in train.part_lr:
        if part == TRIGGER:
            raise UserError("train.part_lr has 'trigger', whose rate is train.trigger_lr")
        if not set(model.names([part])) & set(trained):
            raise UserError(f"train.part_lr has '{part}', which is not trained: add it to train.parts")
    roles = {name: role for role, names in model.roles().items() for name in names}
    found = {}
    for name in model.networks():
        role = roles.get(name, name)
        group = name if name in train.part_lr else role
        found[name] = (group, train.part_lr.get(name, train.part_lr.get(role, train.lr)))
    return {**found, TRIGGER: (TRIGGER, train.trigger_lr or train.lr)}


def make_optimizer(
    chosen: dict[str, Parameter], train: TrainConfig, rates: Mapping[str, tuple[str, float]]
) -> torch.optim.Optimizer:
    """The optimiser over ``chosen``, in groups by :func:`rates`; a network without a rate has ``train.lr``.

    An optimiser of two modes is in that of training.

    With ``train.matrix_options``, weights of two dimensions and the others are in groups of their own.

    Raises:
        UserError: an unknown optimiser, or options it does not take.
    """
    of_group: dict[str, dict[str, Any]] = {}
    for name, parameter in chosen.items():
        group, rate = rates.get(network_of(name), ("", train.lr))
        of_group.setdefault(group, {"params": [], "lr": rate})["params"].append(parameter)
    factory = _factory(train.optimizer)
    options: dict[str, Any] = _decay(factory, train)
    if train.optimizer == "adamw":
        options["betas"] = train.betas
        # One pass over everything: adapters have hundreds of small tensors. torch has it on request alone.
        options["fused"] = not {"foreach", "fused", "differentiable"} & train.optimizer_options.keys()
    if train.optimizer == "adafactor":
        options |= {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    given = _typed(factory, train.optimizer_options)
    matrix = _MATRIX_DEFAULTS.get(OPTIMIZERS.get(train.optimizer, train.optimizer), {}) | _spelt(train.matrix_options)
    if "weight_decay" in options and TRIGGER in of_group:
        # Decay holds what is known in place, and the trigger stands for what is not.
        of_group[TRIGGER]["weight_decay"] = 0.0
    words = [of_group.pop(TRIGGER)] if TRIGGER in of_group else []
    groups = [part for group in of_group.values() for part in _split(group, matrix)] + words
    try:
        with plugin.guarded(factory, f"train.optimizer '{train.optimizer}', when it is made,"):
            made = factory([g for g in groups if g["params"]], lr=train.lr, **options | given)
    except (TypeError, ValueError) as error:
        raise UserError(f"train.optimizer_options do not fit {train.optimizer}: {error}") from error
    # What torch's optimisers do not know in a group they pass over in silence.
    unread = [name for name in matrix if name not in made.defaults]
    if unread and _package(made) in _CLOSED:
        mend = nearest(unread[0], made.defaults) if "rank" in made.defaults else ": did you mean galore?"
        raise UserError(f"train.matrix_options.{unread[0]} is no option of {train.optimizer}{mend}")
    if two_modes(made):
        made.train()
    return made


def _spelt(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: spelt(value) for name, value in options.items()}


def _decay(factory: Any, train: TrainConfig) -> dict[str, Any]:
    """``weight_decay`` for an optimiser that has one.

    Raises:
        UserError: it has none, and the run asks for another than the default; its steps want a closure.
    """
    if any(p.default is p.empty for p in list(inspect.signature(factory.step).parameters.values())[1:]):
        raise UserError(f"train.optimizer '{train.optimizer}' computes the loss anew in a step, which no run does")
    takes = inspect.signature(factory).parameters.values()
    if any(p.name == "weight_decay" or p.kind is p.VAR_KEYWORD for p in takes):
        return {"weight_decay": train.weight_decay}
    if train.weight_decay not in (0.0, TrainConfig.weight_decay):
        raise UserError(f"train.weight_decay: optimizer '{train.optimizer}' has none; set it to 0")
    return {}


def two_modes(optimizer: Any) -> bool:
    """Whether an optimiser holds other weights while it trains than those that are its result (schedule-free ones)."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


@contextmanager
def evaluated(optimizer: Any, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block the weights that an optimiser of two modes gives; afterwards those it trains, bit for bit."""
    own = raw(optimizer)
    if not two_modes(own):
        yield
        return
    # There and back rounds, and a run that is looked at must go on like one that is not.
    aside = [p.detach().to("cpu", copy=True) for p in parameters]
    own.eval()
    try:
        yield
    finally:
        own.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, aside, strict=True):
                parameter.copy_(value)


def _typed(factory: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an optimiser as the types that its signature says, where it says some: torch looks at few of them.

    Raises:
        UserError: naming the option that is of another type.
    """
    try:
        hints = typing.get_type_hints(factory.__init__)  # type: ignore[misc]
    except (NameError, TypeError):
        return _spelt(options)
    typed = {name: value for name, value in options.items() if name in hints}
    return _spelt(options) | {n: convert(hints[n], value, f"train.optimizer_options.{n}") for n, value in typed.items()}


def _split(group: Mapping[str, Any], matrix: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The group's matrices, with their options, and its other parameters; the group itself without options."""
    if not matrix:
        return [dict(group)]
    flat = [p for p in group["params"] if p.dim() == 2]
    rest = [p for p in group["params"] if p.dim() != 2]
    return [{**group, "params": flat, **matrix}, {**group, "params": rest}]


def raw(optimizer: Any) -> Any:
    """The optimiser, without what accelerate has put around it."""
    return getattr(optimizer, "optimizer", optimizer)


def _package(optimizer: Any) -> str:
    return type(raw(optimizer)).__module__.partition(".")[0]


def state_package(optimizer: Any) -> str | None:
    """The package whose classes may be in the state of this optimiser; none for those that keep tensors alone."""
    return None if _package(optimizer) in _CLOSED else _package(optimizer)


def state_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an optimiser's state, or of a part of it, also those in objects of the optimiser's own."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from state_tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from state_tensors(part)
    elif hasattr(value, "__dict__"):
        yield from state_tensors(vars(value))


def _factory(name: str) -> Any:
    path = OPTIMIZERS.get(name, name)
    module, _, attribute = path.rpartition(".")
    if not module:
        raise UserError(f"train.optimizer '{name}' is unknown{nearest(name, OPTIMIZERS)}")
    try:
        with plugin.guarded(f"optimizer {name}", f"train.optimizer '{name}' cannot be loaded: its module"):
            found = getattr(importlib.import_module(module), attribute)
    except UserError as error:
        lacking = error.__cause__
        if not isinstance(lacking, ModuleNotFoundError):
            raise
        extra = ": pip install 'visiontune[galore]'" if lacking.name == "pytorch_optimizer" else ""
        raise UserError(f"train.optimizer '{name}' needs '{lacking.name}', which is not installed{extra}") from lacking
    # It is called with the weights: nothing else that a dotted path leads to may be.
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"train.optimizer '{name}' is no optimiser: name a subclass of torch.optim.Optimizer")
    return found


def make_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning-rate schedule, stepped once per optimiser step."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=train.warmup, num_training_steps=train.steps)


class Optimisation:
    """An optimiser with its schedule, as a part of a checkpoint.

    What is taken up again runs at the options asked for now: without this a lower learning rate would be accepted for a
    run that goes on and then not be used.
    """

    def __init__(self, optimizer: Any, schedule: torch.optim.lr_scheduler.LambdaLR, train: TrainConfig) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self._current = {
            "initial_lr",
            "weight_decay",
            "betas",
            *train.optimizer_options,
            *train.matrix_options,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "taken": self.schedule.last_epoch}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take up a saved optimiser after as many steps of the schedule as it had taken."""
        groups, taken = self.optimizer.param_groups, saved["taken"]
        now = [{k: v for k, v in group.items() if k in self._current} for group in groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for parameter, state in self.optimizer.state.items():
            for tensor in state_tensors([v for v in state.values() if not isinstance(v, Tensor)]):
                tensor.data = tensor.data.to(parameter.device)  # torch moves those outside of objects
        self.schedule.last_epoch = taken
        lrs = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        for group, options, (rate, factor) in zip(self.optimizer.param_groups, now, lrs, strict=True):
            group.update({**options, "lr": rate * factor(taken)})


def checkpoint_gradients(modules: nn.ModuleDict) -> None:
    """Recompute activations in the backward pass, through the switches of diffusers and transformers (non-reentrant).

    Networks without a stack of blocks, such as projections, have little to recompute and are left as they are.

    Raises:
        UserError: another network without such a switch.
    """
    network: Any
    for name, network in modules.items():
        if not any(isinstance(module, (nn.ModuleList, nn.Sequential)) for module in network.modules()):
            continue
        if not getattr(network, "_supports_gradient_checkpointing", True):
            raise UserError(f"train.gradient_checkpointing: the {name} of this model has no gradient checkpointing")
        if hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
        elif hasattr(network, "activation_checkpointing_enable"):
            network.activation_checkpointing_enable({"use_reentrant": False})
        elif hasattr(network, "gradient_checkpointing_enable"):  # transformers before it was renamed
            network.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            raise UserError(f"train.gradient_checkpointing: the {name} of this model has no gradient checkpointing")
