"""Which parameters are trained, and by which optimiser."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from visiontune.errors import UserError
from visiontune.schema import nearest
from visiontune.training.config import TrainConfig

if TYPE_CHECKING:
    from visiontune.models.base import DiffusionModel

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "sgd": "torch.optim.SGD",
    "adafactor": "transformers.optimization.Adafactor",
    "galore": "pytorch_optimizer.GaLore",
}
# It takes all four or none; the values are the paper's for fine-tuning, but for the rank.
_MATRIX_DEFAULTS: dict[str, dict[str, Any]] = {
    "pytorch_optimizer.GaLore": {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"}
}
_CLOSED = ("torch", "transformers")


def modules_of(model: DiffusionModel) -> dict[str, nn.Module]:
    """Every network of the model by the name of its part."""
    return {"vae": model.vae, **model.text_encoders, **model.components()}


def choose(model: DiffusionModel, adapters: Any, train: TrainConfig) -> dict[str, Parameter]:
    """Freeze the model and return what is trained, by name.

    With ``adapters`` their parameters; without, the denoiser's (``train.denoiser``) and the text encoders' own
    (``train.text_encoder``).

    Raises:
        UserError: nothing is left to train; the text encoders are asked for and the adapter has no layer in them; the
            trained weights are not float32.
    """
    if adapters is not None:
        chosen = {f"adapters.{name}": p for name, p in adapters.named_parameters() if p.requires_grad}
    else:
        parts = {"denoiser": model.denoiser} if train.denoiser else {}
        parts |= model.text_encoders if train.text_encoder else {}
        chosen = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    if not train.denoiser:
        text = text_names(chosen, model)
        chosen = {name: p for name, p in chosen.items() if name in text}
        if adapters is not None:
            adapters.requires_grad_(False)
    for module in modules_of(model).values():
        module.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    if not chosen and not train.denoiser:
        raise UserError(
            "there is nothing to train: train.denoiser=false, and the adapter has no layer in a text encoder; look at "
            "adapter.targets"
        )
    if not chosen:
        raise UserError("there is nothing to train: the adapter has no parameters; look at adapter.targets")
    if train.text_encoder and not text_names(chosen, model):
        raise UserError(
            "train.text_encoder is on but the adapter has no layer in a text encoder; look at adapter.targets"
        )
    if any(p.dtype != torch.float32 for p in chosen.values()):
        raise UserError("trained weights must be float32: set model.dtype=fp32 and train.precision=bf16 instead")
    return chosen


def make_optimizer(chosen: dict[str, Parameter], train: TrainConfig, text_names: set[str]) -> torch.optim.Optimizer:
    """The optimiser over ``chosen``; the parameters named in ``text_names`` use ``train.text_encoder_lr``.

    With ``train.matrix_options``, weights of two dimensions and the others are in groups of their own.

    Raises:
        UserError: an unknown optimiser, or options it does not take.
    """
    groups = [{"params": [p for n, p in chosen.items() if n not in text_names], "lr": train.lr}]
    text = [p for n, p in chosen.items() if n in text_names]
    groups.append({"params": text, "lr": train.text_encoder_lr or train.lr})
    options: dict[str, Any] = {"weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        options["betas"] = train.betas
    if train.optimizer == "adafactor":
        options |= {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    factory = _factory(train.optimizer)
    matrix = _MATRIX_DEFAULTS.get(OPTIMIZERS.get(train.optimizer, train.optimizer), {}) | train.matrix_options
    if matrix:
        groups = [part for group in groups for part in _split(group, matrix)]
    try:
        made = factory([g for g in groups if g["params"]], lr=train.lr, **options | train.optimizer_options)
    except (TypeError, ValueError) as error:
        raise UserError(f"train.optimizer_options do not fit {train.optimizer}: {error}") from error
    # What torch's optimisers do not know in a group they pass over in silence.
    unread = [name for name in matrix if name not in made.defaults]
    if unread and _package(made) in _CLOSED:
        raise UserError(f"train.matrix_options.{unread[0]} is no option of {train.optimizer}: did you mean galore?")
    return made


def _split(group: Mapping[str, Any], matrix: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The group's matrices, with their options, and its other parameters."""
    flat = [p for p in group["params"] if p.dim() == 2]
    rest = [p for p in group["params"] if p.dim() != 2]
    return [{**group, "params": flat, **matrix}, {**group, "params": rest}]


def _package(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__module__.partition(".")[0]


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
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        extra = ": pip install 'visiontune[galore]'" if error.name == "pytorch_optimizer" else ""
        raise UserError(f"train.optimizer '{name}' needs '{error.name}', which is not installed{extra}") from error
    except (ImportError, AttributeError) as error:
        raise UserError(f"train.optimizer '{name}' cannot be loaded: {error}") from error


def make_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning-rate schedule, stepped once per optimiser step."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=train.warmup, num_training_steps=train.steps)


def restore(
    optimizer: Any, schedule: torch.optim.lr_scheduler.LambdaLR, saved: dict[str, Any], taken: int, train: TrainConfig
) -> None:
    """Take up a saved optimiser after ``taken`` steps of the schedule, at the options asked for now.

    Without this a lower learning rate would be accepted for a run that goes on and then not be used.
    """
    names = {"initial_lr", "weight_decay", "betas", *train.optimizer_options, *train.matrix_options}
    now = [{k: v for k, v in group.items() if k in names} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        for tensor in state_tensors([v for v in state.values() if not isinstance(v, Tensor)]):
            tensor.data = tensor.data.to(parameter.device)  # torch moves those outside of objects
    schedule.last_epoch = taken
    rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, options, (rate, factor) in zip(optimizer.param_groups, now, rates, strict=True):
        group.update({**options, "lr": rate * factor(taken)})


def text_names(chosen: dict[str, Parameter], model: DiffusionModel) -> set[str]:
    """Names in ``chosen`` that belong to a text encoder."""
    encoders = tuple(f"{name}." for name in model.text_encoders)
    return {name for name in chosen if name.removeprefix("adapters.").startswith(encoders)}


def checkpoint_gradients(modules: nn.ModuleDict) -> None:
    """Recompute activations in the backward pass, through the switches of diffusers and transformers (non-reentrant).

    Raises:
        UserError: a network without such a switch.
    """
    network: Any
    for name, network in modules.items():
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
