"""What a run lends its objective for a batch, and the steps of objectives that are online."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import Parameter

from visiontune.core import Loss
from visiontune.errors import UserError
from visiontune.objectives._old import swapped
from visiontune.objectives.base import Objective, Tools, check_loss, generator
from visiontune.ops.shards import is_sharded
from visiontune.ops.skips import as_opened
from visiontune.training.config import TrainConfig
from visiontune.training.step import Rows

if TYPE_CHECKING:
    from visiontune.models.base import Model


def check_train(objective: Objective, train: TrainConfig) -> None:
    """Refuse options of training that do not suit an objective that is online.

    Raises:
        UserError: accumulation, or checkpoints that would fall between the steps of one rollout.
    """
    if not objective.needs.online:
        return
    if train.accumulate > 1:
        raise UserError("train.accumulate is for objectives with data: set objective.micro_batch instead")
    for name in ("checkpoint_every", "steps"):
        if getattr(train, name) % objective.updates:
            raise UserError(
                f"train.{name}={getattr(train, name)} falls between the steps of one rollout: take a multiple of "
                f"objective.updates={objective.updates}"
            )


class Lender:
    """Makes the `Tools` of each batch.

    Args:
        adapters: whose absence makes the model its own reference; without them a copy of what is trained is kept, where
            the objective needs one.
        objective, reward, seed, accelerator: those of the run.
        parameters: what is trained, by name. text: whether text encoders are. networks: the model's.

    Attributes:
        state: the objective's own.
        lockstep: whether networks are sharded, so that all processes have to call them equally often.
    """

    lockstep = False

    def __init__(
        self,
        adapters: Any,
        objective: Objective,
        reward: Any,
        seed: int,
        accelerator: Accelerator,
        parameters: Mapping[str, Parameter],
        text: bool,
        networks: Iterable[nn.Module] = (),
    ) -> None:
        self.adapters, self.reward, self.seed, self.accelerator = adapters, reward, seed, accelerator
        self.parameters, self.text, self._online = parameters, text, objective.needs.online
        self.reference = reference(adapters, parameters if objective.needs.reference else {}, networks)
        self.state: dict[str, Any] = {}
        if hasattr(reward, "gather"):
            reward.gather = accelerator.gather

    def tools(self, index: int) -> Tools:
        """What the objective may use for batch number ``index``."""
        accelerator = self.accelerator
        return Tools(
            reference=self.reference,
            reward=self.reward,
            rng=generator(self.seed, "noise", index, accelerator.process_index),
            gather=accelerator.gather,
            scale=self._scale() if self._online else 1.0,
            text=self.text,
            seed=self.seed,
            index=index,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            parameters=self.parameters,
            refresh=self.adapters.refresh if self.adapters is not None else _nothing,
            state=self.state,
            lockstep=self.lockstep,
        )

    def _scale(self) -> float:
        scaler = self.accelerator.scaler
        # A gradient scaler comes into being when it first scales something, and unscales nothing before.
        return 1.0 if scaler is None else float(scaler.scale(torch.ones((), device=self.accelerator.device)))

    def average(self) -> None:
        """Average complete gradients over processes; those of sharded weights have been averaged on their way.

        What no process has a gradient of is left without one.
        """
        own = [p for p in self.parameters.values() if not is_sharded(p)]
        if self.accelerator.num_processes == 1 or not own:
            return
        # Every process takes part for every parameter, whether its rows moved it or not.
        moved = torch.tensor([float(p.grad is not None) for p in own], device=self.accelerator.device)
        for parameter, anywhere in zip(own, self.accelerator.reduce(moved, "sum").tolist(), strict=True):
            if anywhere:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, "mean")

    def state_dict(self) -> dict[str, Any]:
        """The objective's state: what has a state of its own gives that, and the rest is given as it is."""
        return {name: value.state_dict() if _stateful(value) else value for name, value in self.state.items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it up again; the objective must have put what is stateful in its place before."""
        for name, value in saved.items():
            if _stateful(self.state.get(name)):
                self.state[name].load_state_dict(value)
            else:
                self.state[name] = value


def reference(
    adapters: Any, parameters: Mapping[str, Parameter], networks: Iterable[nn.Module] = ()
) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the model the untrained one for a while: adapters off, or the values that ``parameters`` have now.

    The ``networks`` are in evaluation mode meanwhile, with the long skips of their checkpoint: what a base with dropout
    predicts is not what it knows.
    """
    frozen = {} if adapters is not None else {name: p.detach().clone() for name, p in parameters.items()}

    @contextmanager
    def context() -> Iterator[None]:
        base = adapters.disable() if adapters is not None else swapped(parameters, frozen, _nothing)
        training = [
            module for network in networks if network.training for module in network.modules() if module.training
        ]
        with base, as_opened(networks):
            # One by one: a module's own `train` may let go of what it keeps between steps.
            for module in training:
                module.training = False
            try:
                yield
            finally:
                for module in training:
                    module.training = True

    return context


class OnlineSteps:
    """Gradients of an ``Online`` objective: rollouts, their reuse, and gradients averaged over processes."""

    def __init__(self, model: Model, objective: Any, rows: Rows, lender: Lender) -> None:
        self.model, self.objective, self.rows, self.lender = model, objective, rows, lender
        self._held: tuple[int, Any] = (-1, None)

    def step(self, step: int) -> Loss:
        """Leave the gradients of a step in ``.grad``, averaged over processes."""
        index, part = divmod(step, self.objective.updates)
        tools = self.lender.tools(index)
        if self._held[0] != index:
            self._held = (-1, None)  # let go of the last rollout before the next is drawn
            batch = self.rows.batch(index).to(self.lender.accelerator.device)
            with torch.no_grad():
                self._held = (index, self.objective.collect(self.model, batch, tools))
        loss = check_loss(self.objective.update(self.model, self._held[1], part, tools), self.objective)
        for parameter in self.lender.parameters.values():
            # One process does as several do: a rollout that teaches nothing leaves zeros.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.lender.average()
        return loss


def _stateful(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def _nothing() -> None:
    """The base's own weights leave nothing behind that was computed from them."""
