"""What a run costs, found by doing one step of it: seconds and bytes, on the device at hand; and at which noise."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from visiontune.assemble.build import build
from visiontune.assemble.folder import check_folder
from visiontune.assemble.parts import passed_over, told_under
from visiontune.config import Run
from visiontune.data.buckets import Size
from visiontune.data.inventory import inventory
from visiontune.data.loader import BatchSampler
from visiontune.data.mix import WHOLE
from visiontune.data.prompts import PromptBatches
from visiontune.diffusion import levels
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.timesteps import Histogram
from visiontune.guidance.stack import GuidanceStack, guidance_of
from visiontune.objectives.base import generator
from visiontune.ops.memory import Kept, Peak, held
from visiontune.training import optim, resume

if TYPE_CHECKING:
    from visiontune.training.loop import Trainer

_SHOWN = 12
_WORD = "trained word"
_DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Counts, seconds and bytes of a run.

    Attributes:
        device: where it was measured.
        samples: instance images; prior_samples: images of prior preservation.
        prompts: what an online objective draws, in place of images; guard_prompts: what its guards draw besides.
        said: lines on what is used and what is not.
        trained: trained values; total: values of all the model's networks.
        layers: names of the adapted layers; empty in full fine-tuning.
        step_seconds: one optimiser step, with accumulation or its share of a rollout; steps: those of the whole run.
        parameter_bytes: the model's weights, the trained ones and what adapters keep beside them, on the device.
        gradient_bytes, optimizer_bytes: of the trained values.
        reference_bytes: a copy of them as they were, for objectives that compare with the base, where no adapter can be
            switched off.
        activation_bytes: what one batch keeps from the forward pass for the backward pass; with an online objective,
            what one prediction of a micro-batch keeps.
        peak_bytes: the most that the device's allocator held in a step after the first; ``None`` where none can be
            asked.
        noise: timesteps as the objective draws them; ``None`` where it takes those of a sampler.
        sizes: heights and widths of the pictures that they were drawn for.
        resting_bytes: of the weights that are on the device only while they are used, and belong to nothing above.
    """

    device: str
    samples: int
    prior_samples: int
    trained: int
    total: int
    layers: list[str]
    step_seconds: float
    steps: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    peak_bytes: int | None = None
    reference_bytes: int = 0
    prompts: int | None = None
    guard_prompts: int = 0
    said: tuple[str, ...] = ()
    noise: Histogram | None = None
    sizes: tuple[Size, ...] = ()
    resting_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """The peak of a step, or the sum of the parts where nobody measured it.

        The sum is not the peak: gradients come while activations go, and kernels need room in passing.
        """
        return self.peak_bytes if self.peak_bytes is not None else self.resident_bytes + self._passing

    @property
    def resident_bytes(self) -> int:
        """What is there in every moment of a step."""
        return self.parameter_bytes + self.optimizer_bytes + self.reference_bytes

    @property
    def _passing(self) -> int:
        """What the largest parts of what comes and goes add up to."""
        return self.gradient_bytes + self.activation_bytes

    def text(self) -> str:
        """The estimate in words, one fact a line."""
        lines = [
            f"data: {self._data()}",
            *self.said,
            f"trainable: {self.trained:,} of {self.total:,} parameters ({self.trained / self.total:.2%})",
            *self._layer_lines(),
            *self._noise_lines(),
            f"time: {self.step_seconds:.3g} s/step on this {self.device}, {self._hours()} for {self.steps} steps",
            *self._memory_lines(),
        ]
        return "\n".join(lines)

    def _memory_lines(self) -> list[str]:
        parts = {"parameters": self.parameter_bytes, "optimiser": self.optimizer_bytes}
        if self.reference_bytes:
            parts["a copy of the base"] = self.reference_bytes
        resident = " + ".join(f"{name} {size(n)}" for name, n in parts.items())
        passing = f"activations {size(self.activation_bytes)}, gradients {size(self.gradient_bytes)}"
        home = [f"in main memory: blocks of {size(self.resting_bytes)}"] if self.resting_bytes else []
        if self.peak_bytes is None:
            return [f"memory: {size(self.memory_bytes)} = {resident} + {passing}; nobody measures its peak here", *home]
        rest = size(max(0, self.peak_bytes - self.resident_bytes))
        line = f"memory: {size(self.peak_bytes)} at the peak of a step = {resident} + {rest} that come and go"
        return [f"{line} ({passing})", *home]

    def _data(self) -> str:
        if self.prompts is not None:
            held = f", and {self.guard_prompts} for the guards" if self.guard_prompts else ""
            return f"{self.prompts} prompts to train on{held}"
        prior = f", and {self.prior_samples} of prior preservation" if self.prior_samples else ""
        return f"{self.samples} images{prior}; every image and caption is readable"

    def _layer_lines(self) -> list[str]:
        if not self.layers:
            words = any(line.startswith(_WORD) for line in self.said)
            return [f"adapted layers: none; {'words alone' if words else 'all weights'} are trained"]
        more = [f"  and {len(self.layers) - _SHOWN} more"] if len(self.layers) > _SHOWN else []
        return [f"adapted layers: {len(self.layers)}", *(f"  {name}" for name in self.layers[:_SHOWN]), *more]

    def _noise_lines(self) -> list[str]:
        if self.noise is None:
            return []
        shown, *others = (f"{height}x{width}" for height, width in self.sizes)
        more = f" and {len(others)} other {'size' if len(others) == 1 else 'sizes'}" if others else ""
        drawn = f"noise: {self.noise.count:,} timesteps drawn for {shown}{more}"
        return [f"{drawn}, mean {self.noise.mean:.3f} of the schedule, 1 being pure noise", *self.noise.lines()]

    def _hours(self) -> str:
        seconds = round(self.step_seconds * self.steps)
        if seconds < 120:
            return f"{seconds} s"
        return f"{seconds // 60} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes in a reader's unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def measure(run: Run) -> Estimate:
    """Do one step of a run after one to warm up, with stand-ins for prior images; nothing stays on disk.

    With an online objective it is one rollout and the steps that it serves, after as much to warm up.

    Raises:
        UserError: whatever would stop the run itself before its first step.
    """
    check_folder(run)
    said: list[str] = []
    with tempfile.TemporaryDirectory() as cache:
        trainer = build(run, cache_dir=Path(cache), draw=_stand_ins, fill=False, say=said.append)
        resume.take_up(trainer)
        kept = Kept([*_tensors(trainer), *trainer.parameters.values()])
        with kept:
            _forward(trainer)
        peak = Peak()
        with peak if trainer.accelerator.device.type == "cpu" else nullcontext():
            _steps(trainer, 0)
        if trainer.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        _steps(trainer, 1)
        seconds = (time.perf_counter() - started) / trainer.objective.updates
        found = _estimate(run, trainer, kept.bytes, seconds, said)
        return dataclasses.replace(found, peak_bytes=_peak(trainer, peak, found.resident_bytes))


def _peak(trainer: Trainer, seen: Peak, resident: int) -> int | None:
    """The most that the device's allocator held in a step.

    What the first steps made for good, the optimiser's state, is resident in all others, and is not counted twice.
    """
    kind = trainer.accelerator.device.type
    if kind == "cpu":
        return resident + seen.beside(optim.state_tensors(trainer.optimizer.state))
    return torch.cuda.max_memory_allocated() if kind == "cuda" else None


def _forward(trainer: Trainer) -> None:
    """What keeps the most for a backward pass: a batch's loss, or a prediction of an online objective's micro-batch."""
    if not trainer.online:
        trainer.loss(0)
        return
    batch = trainer.rows.batch(0).to(trainer.accelerator.device)
    trainer.objective.probe(trainer.precise, batch, trainer.lender.tools(0))


def _estimate(run: Run, trainer: Trainer, activations: int, seconds: float, said: Sequence[str]) -> Estimate:
    device, trained = trainer.accelerator.device, list(trainer.parameters.values())
    own = [] if trainer.adapters is None else [*trainer.adapters.parameters(), *trainer.adapters.buffers()]
    everything = {id(t): t for t in [*_tensors(trainer), *trained]}
    resting = {id(t): t for one in trainer.model.offloaded.values() for t in one.tensors()}
    placed = [t for name, t in everything.items() if name not in resting]
    state = optim.state_tensors(trainer.optimizer.state)
    return Estimate(
        device=str(device),
        **_counts(trainer),
        trained=sum(p.numel() for p in trained),
        total=sum(t.numel() for t in everything.values()),
        layers=trainer.adapters.layers if trainer.adapters is not None else [],
        step_seconds=seconds,
        steps=run.train.steps,
        parameter_bytes=held([*placed, *own], device),
        gradient_bytes=held(trained),
        optimizer_bytes=held(state) + (held(trained) if run.train.ema is not None else 0),
        activation_bytes=activations,
        resting_bytes=held(resting.values()),
        reference_bytes=held(trained) if trainer.adapters is None and trainer.objective.needs.reference else 0,
        said=(*_used(run, trainer), *said, *_computed(run, trainer)),
        **_noise(run, trainer),
    )


def _computed(run: Run, trainer: Trainer) -> list[str]:
    """What was found out of attention and compilation in the steps that were done."""
    lines = [] if trainer.model.attention is None else trainer.model.attention.told()
    if run.model.compile:
        from visiontune.models._compiled import told

        lines.append(told())
    return lines


def _counts(trainer: Trainer) -> dict[str, Any]:
    """How much data there is."""
    if isinstance(trainer.rows, PromptBatches):
        held = len(trainer.guard.prompts) if trainer.guard is not None else 0
        return {"samples": 0, "prior_samples": 0, "prompts": len(trainer.rows), "guard_prompts": held}
    assert isinstance(trainer.rows, BatchSampler)
    return {"samples": len(trainer.rows.rows), "prior_samples": len(trainer.rows.rows.prior)}


def _noise(run: Run, trainer: Trainer) -> dict[str, Any]:
    """Timesteps drawn by the objective for latents of the sizes that it trains on, each as often as it comes."""
    model, rng = trainer.model, generator(run.seed, "check")
    if not hasattr(model, "schedule"):
        return {}
    counts = {(model.resolution, model.resolution): 1}
    if isinstance(trainer.rows, BatchSampler):
        buckets = trainer.rows.rows.buckets
        counts = {size: len(buckets[size]) for size in sorted(buckets, key=lambda size: -len(buckets[size]))}
    drawn = []
    for size, count in counts.items():
        rows = math.ceil(_DRAWS * count / sum(counts.values()))
        bounds = _bounds(run, model.schedule, rows)
        t = trainer.objective.draw_timesteps(model, model.latent_shape(*size), rows, rng, bounds)
        if t is None:
            return {}
        drawn.append(t.double() / model.schedule.num_train_timesteps)
    return {"noise": Histogram.of(torch.cat(drawn)), "sizes": tuple(counts)}


def _bounds(run: Run, schedule: Schedule, rows: int) -> Tensor | None:
    """Low and high ``[rows, 2]`` of rows that sources share by their weights; ``None`` where no source has a range."""
    if set(run.data.ranges()) == {WHOLE}:
        return None
    weights = torch.tensor(run.data.weights(), dtype=torch.float64)
    ends = (weights.cumsum(0) / weights.sum() * rows).round().long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    return levels.shares(torch.tensor(run.data.ranges()).repeat_interleave(counts, 0), schedule)


def _used(run: Run, trainer: Trainer) -> list[str]:
    """What the run uses of its data, and the layers that it passes over."""
    data = inventory(trainer.rows.rows.samples, run.data) if isinstance(trainer.rows, BatchSampler) else []
    words = trainer.adapters.embeddings() if trainer.adapters is not None else {}
    learnt = [f"{_WORD}: '{word}' in {name}" for name, own in words.items() for word in own.words]
    under = told_under(run, trainer.under)
    return [*data, *learnt, *under, *passed_over(run, trainer.model), *_guided(run, trainer)]


def _guided(run: Run, trainer: Trainer) -> list[str]:
    """What terms of guidance cost, where pictures are drawn."""
    lines = []
    for section, options in {"objective": trainer.objective.config, "preview": run.preview}.items():
        if getattr(options, "guidance", None) is not None:
            stack: Any = guidance_of(trainer.model, options.cfg_scale, GuidanceStack.of_options(options))
            lines.append(f"{section}.guidance: {stack.plan(trainer.model, options.steps).total()}")
    return lines


def _steps(trainer: Trainer, turn: int) -> None:
    """The optimiser steps of one batch or one rollout, as the loop does them, without its log."""
    count = trainer.objective.updates
    for step in range(turn * count, (turn + 1) * count):
        trainer.optimise(step)
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def _tensors(trainer: Trainer) -> list[Tensor]:
    """Weights and buffers of all the model's networks, and of what lies under the adapter."""
    held = [*trainer.model.networks().values(), *([] if trainer.under is None else [trainer.under])]
    return [t for module in held for t in (*module.parameters(), *module.buffers())]


def _stand_ins(model: Any, prompts: Sequence[str], *_: Any, steps: int = 1, **__: Any) -> np.ndarray:
    """Grey pictures in the place of prior images: the cost of a step does not depend on what they show."""
    model.check_steps(steps)
    return np.full((len(prompts), model.resolution, model.resolution, 3), 127, np.uint8)
