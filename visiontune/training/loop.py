"""The training loop: any objective, any adapter or none, any model family.

Everything random is a function of the seed and the step number (the batch, the noise, the timesteps, dropout), so a
checkpoint holds no generator states, and a run that goes on from one does what an uninterrupted run does, on a CPU bit
for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor

from visiontune import signals
from visiontune.core import Loss
from visiontune.errors import Stopped, UserError
from visiontune.objectives.base import Objective, seed_of
from visiontune.ops.shards import is_sharded, whole
from visiontune.ops.threads import Threads
from visiontune.sampling.shown import Shown
from visiontune.training import checkpoint, guards, optim, preview, result, resume, sharding, trouble
from visiontune.training.config import PreviewConfig, TrainConfig
from visiontune.training.devices import make_accelerator, precision_of
from visiontune.training.ema import Average
from visiontune.training.home import Home
from visiontune.training.lending import Lender, OnlineSteps, check_train
from visiontune.training.step import Rows, Step
from visiontune.training.trackers import Meter, Metrics

if TYPE_CHECKING:
    from visiontune.models.base import Model


class Trainer:
    """One run.

    Args:
        model: the base model; moved to the training device and frozen but for what is trained.
        adapters: an attached ``AdapterSet``, or ``None`` to train the networks' own weights.
        under: another one beneath it that every step computes with, frozen, and no picture and no result.
        objective: computes the loss, or the gradients.
        rows: gives the batches.
        train: options of the run.
        out: the run folder.
        preview: options of the previews. shown: what stands beside their prompts, if anything does.
        seed: with the step number, the source of everything random.
        metadata: strings for the header of ``adapter.safetensors`` and the model card (``trigger``, ``prompt``, ...).
        accelerator: made from ``train`` unless given.
        reward: what an online objective scores pictures by.
        guard: looks at what an online objective does to the pictures.
        home: ``out``, where it is held already; otherwise it is while the run trains.
        shards: what has sharded the model already, where accelerate's configuration asks for FSDP.

    Raises:
        UserError: nothing to train, an impossible precision, an unknown optimiser or tracker, a guard that cannot look.
    """

    def __init__(
        self,
        *,
        model: Model,
        adapters: Any,
        under: Any = None,
        objective: Objective,
        rows: Rows,
        train: TrainConfig,
        out: Path,
        preview: PreviewConfig | None = None,
        shown: Sequence[Shown] = (),
        seed: int = 0,
        metadata: Mapping[str, str] | None = None,
        accelerator: Accelerator | None = None,
        reward: Any = None,
        guard: guards.Guard | None = None,
        home: Home | None = None,
        shards: sharding.Shards | None = None,
    ) -> None:
        self.model: Any = model
        self.adapters, self.objective, self.rows, self.online = adapters, objective, rows, objective.needs.online
        self.under, self.under_digest = under, None if under is None else under.digest()
        self.train, self.preview, self.seed, self.out = train, preview or PreviewConfig(), seed, Path(out)
        self.shown = tuple(shown)
        self.metadata, self.guard, self.home = dict(metadata or {}), guard, home or Home(out)
        self.accelerator = accelerator or make_accelerator(train, self.out)
        self.shards = shards or sharding.of(self.accelerator)
        if self.shards is None:
            model.to(self.accelerator.device)
            self.parameters = optim.choose(model, adapters, train.networks)
        else:
            self.parameters = self.shards.spread(model, adapters, under, objective, train)
        # Whether what is trained is sharded, and not only what computes with it.
        self.sharded = any(map(is_sharded, self.parameters.values()))
        check_train(objective, train)
        if guard is not None:
            guards.check(guard.config, objective)
        networks, trained = model.networks(), model.names(train.networks)
        text = optim.trains_text(model, train)
        objective.check_text(text)
        objective.check(model, reward)
        if unwanted := {*model.names(train.release or ())} & {*trained, *model.names()}:
            raise UserError(f"train.release has '{min(unwanted)}', which every step computes with: leave it out")
        model.release(*train.release or ())
        self.precise = model.at(precision_of(self.accelerator))
        # Gradients of what is trained come through the networks that the loss is computed by.
        parts = {name: networks[name] for name in networks if name in {*trained, *model.names()}}
        # What an online objective draws and what it computes again must agree, so it never trains with dropout.
        step = Step(self.precise, parts, adapters, objective).train(not self.online)
        if train.gradient_checkpointing:
            optim.checkpoint_gradients(step.parts)
        # The gradients of online objectives come in pieces and are averaged over processes once, without DDP's hooks,
        # and so are those of adapters on networks that are sharded, or not whole on the device.
        self._averages = self.shards is not None or bool(model.offloaded)
        self.step_module = step if self.online or self._averages else self.accelerator.prepare_model(step)
        self.lender = Lender(
            adapters, objective, reward, seed, self.accelerator, self.parameters, text, [*step.parts.values()]
        )
        self.lender.lockstep = self.shards is not None
        objective.setup(self.precise, self.lender.tools(0))
        self.online_steps = OnlineSteps(self.precise, objective, rows, self.lender) if self.online else None
        trouble.check_drawing(model, self.preview, guard)
        optimizer = optim.make_optimizer(self.parameters, train, optim.rates(model, train))
        if self.shards is not None:
            sharding.check_optimizer(optimizer, train.optimizer)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.schedule = optim.make_schedule(optimizer, train)
        self._rates = list(self.schedule.base_lrs)
        self.meter, self.average = Meter(), Average(list(self.parameters.values()), train.ema)
        size = sum(p.numel() for part in parts.values() for p in part.parameters())
        # A trial calls the networks, and processes that choose by their own clocks would call them at different times.
        given = train.threads or (torch.get_num_threads() if self.shards is not None else 0)
        self.threads = Threads(self.accelerator.device, size, given)
        self.stateful, self.idle = self._stateful(reward), trouble.Idle()

    def _stateful(self, reward: Any) -> dict[str, Any]:
        """What a checkpoint carries besides weights, each part with torch's `state_dict` and `load_state_dict`."""
        parts = {
            "optimisation": optim.Optimisation(self.optimizer, self.schedule, self.train),
            "average": self.average,
            "meter": self.meter,
            "threads": self.threads,
            "objective": self.lender,
            "guard": self.guard,
            "scaler": self.accelerator.scaler,
            "reward": reward if hasattr(reward, "state_dict") else None,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def fit(self) -> Path:
        """Train to ``train.steps`` and write the results into the run folder.

        Returns:
            ``adapter.safetensors``, or the folder ``model`` after full fine-tuning.

        Raises:
            UserError: the folder holds a run that is not to be resumed, or one with other settings; the loss or the
                weights are not finite; the disk is full. Checkpoints written before stay as they are.
            Stopped: an alarm of the guard ended the run; the result holds the weights of the last good checkpoint.
            Interrupted: Ctrl-C or SIGTERM, after the step in which it came, which has a checkpoint.
        """
        from tqdm.auto import tqdm

        with trouble.readable_disk_errors(self.out), self.home:
            start = resume.begin(self)
            # Nothing is kept of a run that begins, not even what was measured before its first step.
            metrics = Metrics(self.accelerator, self.out, self.train.trackers, start or -1)
            try:
                if start == 0:
                    metrics.log(0, self._check(0))
                    self._preview(0, metrics)
                self._stop_if_alarmed()
                # Only where it must be, so that TQDM_DISABLE is heard elsewhere.
                quiet = {} if self.accelerator.is_local_main_process else {"disable": True}
                bar = tqdm(range(start, self.train.steps), "training", self.train.steps, initial=start, **quiet)
                self.threads.begin(self._trial)
                with self.precise.training(), signals.Asked("the step") as asked:
                    for step in bar:
                        started = time.perf_counter()
                        bar.set_postfix(loss=f"{self.optimise(step):.4f}", refresh=False)
                        if self.threads.slowed(time.perf_counter() - started):
                            self.threads.choose(self._trial)
                        self._after(step + 1, metrics)
                        self._stop_if_alarmed()
                        self._stop_if_asked(step + 1, asked)
            finally:
                metrics.close()
                self.rows.close()
            return self._finish()

    @torch.no_grad()
    def _trial(self) -> None:
        """What a step mostly computes, and leaves nothing behind."""
        batch = self.rows.batch(0).to(self.accelerator.device)
        self.objective.probe(self.precise, batch, self.lender.tools(0))

    # -- one step -----------------------------------------------------------------------------------------------

    def optimise(self, step: int) -> float:
        """One optimiser step; returns its loss, averaged over accumulated batches and processes."""
        accelerator, started = self.accelerator, time.perf_counter()
        set_seed(seed_of(self.seed, "step", step, accelerator.process_index) % 2**32)
        total, terms = self._gradients(step)
        if self.adapters is not None:
            self.adapters.before_step(step, 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale())
        self.idle.check(self, step, terms)
        norm = None
        if self.train.max_grad_norm is not None:
            norm = whole(accelerator.clip_grad_norm_(list(self.parameters.values()), self.train.max_grad_norm))
        total = accelerator.reduce(total, "mean")
        trouble.check_loss(float(total), step + 1, self.out)
        if norm is not None and accelerator.scaler is None:
            trouble.check_loss(float(norm), step + 1, self.out, "gradient")
        self._update(step)
        self._note({"loss": total, "seconds": torch.tensor(time.perf_counter() - started, device=total.device)})
        if norm is not None:
            self._note({"grad_norm": norm})
        return float(total)

    def _gradients(self, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Leave a step's gradients in ``.grad``; its loss on this process, and what the last batch logs."""
        if self.online_steps is not None:
            loss = self.online_steps.step(step)
            self._note(loss.terms)
            return loss.total, loss.terms
        total = torch.zeros((), device=self.accelerator.device)
        # Parts of weights have parts of gradients after each batch: whole ones would have to be kept otherwise.
        together = () if self._averages else (self.step_module,)
        for part in range(self.train.accumulate):
            with self.accelerator.accumulate(*together):
                loss = self.loss(step * self.train.accumulate + part)
                self.accelerator.backward(loss.total)
                total += loss.total.detach() / self.train.accumulate
                self._note(loss.terms)
        if self._averages:
            self.lender.average()
        return total, loss.terms

    def _note(self, values: Mapping[str, Tensor]) -> None:
        self.meter.add(values)
        if self.guard is not None:
            self.guard.add(values)

    def loss(self, index: int) -> Loss:
        """Loss of this process's batch number ``index``."""
        batch = self.rows.batch(index).to(self.accelerator.device)
        if self.lender.text and batch.cond is not None:
            raise ValueError("rows with a finished condition cannot train the text encoder: it would get no gradient")
        with self.accelerator.autocast():
            return self.step_module(batch, self.lender.tools(index))

    def _update(self, step: int) -> None:
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.schedule.step()
            if self.adapters is not None:
                self.adapters.after_step((step + 1) / self.train.steps, self.optimizer)
            if self.average.decay is not None:
                with optim.evaluated(self.optimizer, self.average.parameters):
                    self.average.update()
        self.optimizer.zero_grad()

    # -- after a step -------------------------------------------------------------------------------------------

    def _after(self, step: int, metrics: Metrics) -> None:
        """Log, draw and save what is due after ``step`` steps.

        The checkpoint comes last: whatever belongs to earlier steps is then on disk already, and whatever a killed run
        wrote after it is written again.
        """
        last = step == self.train.steps
        row = {}
        if last or step % self.train.log_every == 0:
            self.meter.reduce(self.accelerator)
            row = {**self.meter.take(), "lr": float(self.optimizer.param_groups[0]["lr"])}
        metrics.log(step, {**row, **self._check(step)})
        if preview.due(step, self.train.steps, self.preview):
            self._preview(step, metrics)
        if last or step % self.train.checkpoint_every == 0 or (self.guard is not None and self.guard.stops()):
            resume.save(self, step)

    def _check(self, step: int) -> dict[str, float]:
        """Let the guard look, if that is due after ``step`` steps; what it measured."""
        guard = self.guard
        if guard is None or not guard.due(step, self.train.steps):
            return {}
        images, found = None, [dict[str, float]()]
        if self._draws:
            with self.looking():
                images = guard.draw(self.model)
                found = [guard.measure(images, self.out, self.adapters, self.accelerator.device)]
        # All processes judge, each by what the first one saw, so that they go on or stop together.
        values: dict[str, float] = broadcast_object_list(found)[0]
        guard.meter.reduce(self.accelerator)
        broken = guard.check(step, values)
        if self.accelerator.is_main_process and images is not None:
            if broken or step == 0:
                guard.keep(self.out, step, images)
            guard.report(broken, self.out)
        self.set_rates()
        return {f"guard/{name}": value for name, value in {**guard.latest, "alarms": float(len(broken))}.items()}

    def set_rates(self) -> None:
        """The learning rates as the guard leaves them."""
        factor = self.guard.factor if self.guard is not None else 1.0
        self.schedule.base_lrs = [rate * factor for rate in self._rates]
        rates = zip(self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        for group, rate, shape in rates:
            group["lr"] = rate * shape(self.schedule.last_epoch)

    def _preview(self, step: int, metrics: Metrics) -> None:
        if self.preview.prompts and self._draws:
            with self.looking():
                pixels = preview.draw(self.model, self.preview, self.shown)
            if self.accelerator.is_main_process:
                preview.keep(self.out, step, self.preview, pixels, self.shown)
                metrics.images(step, pixels)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """The model as its user will have it: the optimiser's result, averaged, in evaluation mode, no gradients.

        Nothing lies under the adapter then.
        """
        self.rows.close()  # what works ahead may use the networks that drawing moves
        alone = nullcontext() if self.under is None else self.under.disable()
        with optim.evaluated(self.optimizer, self.average.parameters), self.average.applied(), alone, torch.no_grad():
            # Adapters keep what they computed from their parameters until the mode is switched.
            self.step_module.eval()
            yield
        self.step_module.train(not self.online)

    # -- the end ------------------------------------------------------------------------------------------------

    def _stop_if_alarmed(self) -> None:
        """End a run whose last check broke a bound: its result has the weights of the last good checkpoint."""
        if self.guard is None or not self.guard.stops():
            return
        good, words = self.guard.last_good(self.out), self.guard.message(self.out, result.place(self))
        if good is not None:
            taken = resume.load(self, good)
            self._finish({"taken from": f"step {taken}, the last good checkpoint before an alarm"})
        raise Stopped(words)

    def _stop_if_asked(self, step: int, asked: signals.Asked) -> None:
        """End a run that a signal asks to, where it can go on; all processes do what one of them is asked."""
        number = asked.number
        if self.accelerator.num_processes > 1:
            seen = torch.tensor([number], device=self.accelerator.device)
            number = int(self.accelerator.gather(seen).max())
        # The last step is followed by the results alone, and a rollout is finished.
        if not number or step == self.train.steps or (self.online and step % self.objective.updates):
            return
        if step % self.train.checkpoint_every:
            resume.save(self, step)
        where = checkpoint.folder(self.out, step)
        raise signals.Interrupted(f"{signals.name(number)} after step {step}; {where} holds it", number)

    @property
    def _draws(self) -> bool:
        """Whether this process draws what one process draws; with sharded networks all do, and one keeps it."""
        return self.shards is not None or self.accelerator.is_main_process

    def _finish(self, facts: Mapping[str, str] | None = None) -> Path:
        if self._draws:
            result.write(self, facts or {})
        self.accelerator.wait_for_everyone()
        return result.place(self)
