"""FSDP2: networks whose weights are shared out among the processes of a run.

accelerate's own configuration asks for it (``accelerate launch --use_fsdp --fsdp_version 2``, or the variables of the
environment that this sets), and torch does it. What is sharded are the networks that every step computes with: the
first role's, and those that are trained. Each block is a unit, whose weights are whole while it computes. Adapters are
small and belong to no network: every process has them, and their gradients are averaged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import init_device_mesh
from torch.nn import Parameter

from visiontune.adapters.base import whole_base
from visiontune.errors import UserError
from visiontune.models._blocks import named
from visiontune.ops.shards import is_sharded, whole
from visiontune.schema import nearest
from visiontune.training import optim

if TYPE_CHECKING:
    from visiontune.models.base import Model
    from visiontune.objectives.base import Objective
    from visiontune.training.config import TrainConfig

_log = logging.getLogger(__name__)
_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism_config",
}
# What accelerate's configuration may ask for that a run does not do, and the mend.
_UNABLE: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda p: p.fsdp_version != 2, "version 1 is not supported: set fsdp_version to 2 (--fsdp_version 2)"),
    (lambda p: not p.reshard_after_forward, "set fsdp_reshard_after_forward to true"),
    (lambda p: isinstance(p.cpu_offload, CPUOffloadPolicy), "set fsdp_offload_params to false"),
    (
        lambda p: p.activation_checkpointing,
        "set fsdp_activation_checkpointing to false, and train.gradient_checkpointing=true",
    ),
    (lambda p: p.ignored_modules is not None, "leave fsdp_ignored_modules out"),
    (
        lambda p: p.auto_wrap_policy is size_based_auto_wrap_policy,
        "set fsdp_auto_wrap_policy to TRANSFORMER_BASED_WRAP",
    ),
    (lambda p: p.state_dict_type.name == "FULL_STATE_DICT", "set fsdp_state_dict_type to SHARDED_STATE_DICT"),
)
# They look at each value of a weight by itself, as a part of it can be.
_ELEMENTWISE = {"Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}


def asked() -> FullyShardedDataParallelPlugin | None:
    """What accelerate's configuration says of FSDP; ``None`` where it does not ask for it.

    Raises:
        UserError: it asks for something that a run cannot do, or that was never tried.
    """
    for variable, name in _OTHERS.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"{name} is not supported: start the run with FSDP version 2 (accelerate launch --use_fsdp "
                "--fsdp_version 2), or as plain processes"
            )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, KeyError) as error:
        raise UserError(f"FSDP: accelerate's configuration cannot be read: {error}") from error
    for says, mend in _UNABLE:
        if says(plugin):
            raise UserError(f"FSDP: {mend}")
    return plugin


def check_adapter(config: Any, name: str) -> None:
    """Refuse a method that reads or writes the base's weights where a process has but a part of them.

    Args:
        config: of the method. name: the method's.

    Raises:
        UserError: naming what would do.
    """
    if why := whole_base(config):
        raise UserError(
            f"adapter '{name}' {why}, and with FSDP a process has but a part of them: take lora, or start without FSDP"
        )


def networks_of(model: Model, train: TrainConfig) -> list[str]:
    """The networks that are sharded: those that every step computes with."""
    return [name for name in model.networks() if name in {*model.names(), *model.names(train.networks)}]


def check(model: Model, adapters: Any, objective: Objective, train: TrainConfig) -> None:
    """Refuse what cannot be done with parts of weights, before anything is sharded.

    Raises:
        UserError: naming the option to change.
    """
    check_objective(objective)
    for name in networks_of(model, train):
        for parameter in model.networks()[name].parameters():
            if type(parameter) is not Parameter or not parameter.is_floating_point():
                raise UserError(f"FSDP: the {name} is quantised: leave model.quantize out, or start without FSDP")
    if adapters is not None:
        check_adapter(adapters.config, adapters.method)
    elif train.precision == "fp16":
        raise UserError("FSDP: the weights of networks are not trained in fp16: set train.precision=bf16")


def check_objective(objective: Objective) -> None:
    """Refuse an objective of which processes would wait for each other.

    Raises:
        UserError: it computes on more rows in one process than in another.
    """
    if not objective.even:
        raise UserError(
            f"objective '{type(objective).__module__.rpartition('.')[2]}' computes on more rows in one process than in "
            "another, and with FSDP all have to do the same: start without FSDP"
        )


def check_optimizer(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Refuse an optimiser that looks at whole matrices, where it has to train parts of them.

    Raises:
        UserError: naming those that do not.
    """
    sharded = any(is_sharded(p) for group in optimizer.param_groups for p in group["params"])
    kind = type(optimizer)
    if sharded and not (kind.__module__.startswith("torch.optim.") and kind.__name__ in _ELEMENTWISE):
        raise UserError(
            f"FSDP: train.optimizer '{name}' looks at whole weights: take adamw, sgd or another one of torch that "
            "treats each value by itself, or train an adapter"
        )


def of(accelerator: Accelerator) -> Shards | None:
    """What shards the networks of a run; ``None`` without FSDP.

    Raises:
        UserError: see :func:`asked`.
    """
    plugin = asked()
    if plugin is None:
        return None
    if accelerator.num_processes == 1:
        _log.warning("FSDP: there is one process, so nothing is sharded")
        return None
    return Shards(accelerator, plugin)


class Shards:
    """Shards networks among the processes of a run, and puts them together again.

    Attributes:
        mesh: the processes.
        networks: those that are sharded, by name.
    """

    def __init__(self, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self._named = tuple(plugin.transformer_cls_names_to_wrap or ())
        self.networks: dict[str, nn.Module] = {}

    # -- sharding -----------------------------------------------------------------------------------------------

    def spread(
        self, model: Model, adapters: Any, under: Any, objective: Objective, train: TrainConfig
    ) -> dict[str, Parameter]:
        """Shard the networks of a model onto the device, once, and move the others there.

        Those that are sharded need not fit there whole.

        Returns:
            What is trained, as :func:`visiontune.training.optim.choose` gives it, with sharded weights in the place of
            whole ones.

        Raises:
            UserError: blocks that accelerate's configuration names are not there; or as ``choose`` and :func:`check`.
        """
        # What asks for gradients has to be known before.
        chosen = optim.choose(model, adapters, train.networks)
        if self.networks:
            return chosen
        check(model, adapters, objective, train)
        self.networks = {name: model.networks()[name] for name in networks_of(model, train)}
        self._check_named()
        for name, network in self.networks.items():
            self._shard(name, network)
        if others := [name for name in model.networks() if name not in self.networks]:
            model.to(self.device, *others)
        for one in (adapters, under):
            if one is not None:
                one.to(self.device)
        return optim.choose(model, adapters, train.networks)

    def _check_named(self) -> None:
        kinds = {kind.__name__ for network in self.networks.values() for kind in map(type, network.modules())}
        if unknown := [name for name in self._named if name not in kinds]:
            raise UserError(f"FSDP: no network has a layer of class '{unknown[0]}'{nearest(unknown[0], kinds)}")

    def _shard(self, name: str, network: nn.Module) -> None:
        blocks = self._blocks(network)
        if not blocks and self.main:
            _log.warning("FSDP: the %s names no blocks, so all its weights are gathered at once", name)
        # Torch shards no number without dimensions.
        ignored = {p for p in network.parameters() if not p.dim()}
        # A unit that kept its weights after a pass would not see what is written to their parts.
        for module in [*blocks, network]:
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, ignored_params=ignored)
        # Configurations that are saved name the class, of which torch has made another.
        type(network).__name__ = type(network).__mro__[2].__name__

    def _blocks(self, network: nn.Module) -> list[nn.Module]:
        """The units within a network, inner ones first: those of accelerate's configuration, or the network's own."""
        names = {*self._named} or named(network)
        return [m for m in reversed([*network.modules()]) if m is not network and type(m).__name__ in names]

    # -- together again -----------------------------------------------------------------------------------------

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside the block the first process has all weights whole, in the main memory; every process takes part."""
        before: list[tuple[nn.Module, str, Parameter]] = []
        made: dict[Parameter, Parameter] = {}
        for module in (m for network in self.networks.values() for m in network.modules()):
            for name, parameter in [*module.named_parameters(recurse=False)]:
                if not is_sharded(parameter):
                    continue
                if parameter not in made:
                    values = whole(parameter.detach())
                    made[parameter] = Parameter(values.cpu(), requires_grad=False) if self.main else parameter
                before.append((module, name, parameter))
                module.register_parameter(name, made[parameter])
        try:
            yield
        finally:
            for module, name, parameter in before:
                module.register_parameter(name, parameter)
