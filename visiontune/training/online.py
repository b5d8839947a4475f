"""Optimiser steps of online objectives: rollouts, their reuse, and gradients averaged over processes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from visiontune.core import Condition, Loss
from visiontune.errors import UserError
from visiontune.objectives._online import Online, Tools
from visiontune.training.config import TrainConfig
from visiontune.training.step import Rows

if TYPE_CHECKING:
    from visiontune.models.base import DiffusionModel


class Precise:
    """A model whose networks run in the run's precision; everything between them stays in float32."""

    def __init__(self, model: Any, accelerator: Accelerator) -> None:
        self._model, self._accelerator = model, accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        with self._accelerator.autocast():
            return self._model.predict(x_t, t, cond)

    def logits(self, tokens: Tensor, cond: Condition) -> Tensor:
        with self._accelerator.autocast():
            return self._model.logits(tokens, cond)

    def embed(self, prompts: Any) -> Condition:
        with self._accelerator.autocast():
            return self._model.embed(prompts)

    def unconditional(self, count: int) -> Condition:
        with self._accelerator.autocast():
            return self._model.unconditional(count)

    def decode(self, latents: Tensor) -> Tensor:
        with self._accelerator.autocast():
            return self._model.decode(latents)


def check_train(objective: Online, train: TrainConfig) -> None:
    """Refuse options of training that do not suit an online objective.

    Raises:
        UserError: accumulation, text encoders where the objective cannot train them (or trained ones that it lacks), or
            checkpoints that would fall between the steps of one rollout.
    """
    objective.check_text(train.text_encoder)
    if train.accumulate > 1:
        raise UserError("train.accumulate is for objectives with data: set objective.micro_batch instead")
    for name in ("checkpoint_every", "steps"):
        if getattr(train, name) % objective.updates:
            raise UserError(
                f"train.{name}={getattr(train, name)} falls between the steps of one rollout: take a multiple of "
                f"objective.updates={objective.updates}"
            )


class OnlineSteps:
    """Gradients of each optimiser step.

    Args:
        model, adapters, objective, rows, train, reward, seed, accelerator: those of the run.
        parameters: what is trained.

    Attributes:
        state: the objective's own, kept in checkpoints.

    Raises:
        UserError: the objective cannot work with the reward, the model or the options of training, or compares with a
            base that there is not without an adapter.
    """

    def __init__(
        self,
        model: DiffusionModel,
        adapters: Any,
        objective: Online,
        rows: Rows,
        train: TrainConfig,
        reward: Any,
        seed: int,
        accelerator: Accelerator,
        parameters: dict[str, Parameter],
    ) -> None:
        check_train(objective, train)
        objective.check(model, reward)
        if objective.referenced and adapters is None:
            _no_reference()
        self.model: Any = Precise(model, accelerator)
        self.adapters, self.objective, self.rows, self.train = adapters, objective, rows, train
        self.reward, self.seed, self.accelerator, self.parameters = reward, seed, accelerator, parameters
        if hasattr(reward, "gather"):
            reward.gather = accelerator.gather
        self.state: dict[str, Any] = {}
        self._held: tuple[int, Any] = (-1, None)

    def step(self, step: int) -> Loss:
        """Leave the gradients of a step in ``.grad``, averaged over processes."""
        index, part = divmod(step, self.objective.updates)
        tools = self.tools(index)
        if self._held[0] != index:
            self._held = (-1, None)  # let go of the last rollout before the next is drawn
            batch = self.rows.batch(index).to(self.accelerator.device)
            with torch.no_grad():
                self._held = (index, self.objective.collect(self.model, batch, tools))
        loss = self.objective.update(self.model, self._held[1], part, tools)
        self._average()
        return loss

    def tools(self, index: int) -> Tools:
        """What the objective may use for a rollout."""
        accelerator = self.accelerator
        return Tools(
            reward=self.reward,
            reference=self.adapters.disable if self.adapters is not None else _no_reference,
            gather=accelerator.gather,
            scale=self._scale(),
            text=self.train.text_encoder,
            seed=self.seed,
            index=index,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            parameters=self.parameters,
            refresh=self.adapters.refresh if self.adapters is not None else _nothing,
            state=self.state,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs besides the weights: the objective's own state and the reward's."""
        keeps = getattr(self.reward, "state_dict", None)
        return {"objective": self.state, "reward": keeps() if keeps else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint up again."""
        self.state = state["objective"]
        if state["reward"] is not None:
            self.reward.load_state_dict(state["reward"])

    def _scale(self) -> float:
        scaler = self.accelerator.scaler
        # A gradient scaler comes into being when it first scales something, and unscales nothing before.
        return 1.0 if scaler is None else float(scaler.scale(torch.ones((), device=self.accelerator.device)))

    def _average(self) -> None:
        for parameter in self.parameters.values():
            # Every process takes part for every parameter, whether its rows moved it or not, and one process does as
            # several do: a rollout that teaches nothing leaves zeros.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.accelerator.num_processes > 1:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")


def _nothing() -> None:
    """The base's own weights leave nothing behind that was computed from them."""


def _no_reference() -> nullcontext[None]:
    raise UserError("objective compares with the base model, which training all weights does not keep: set an adapter")
