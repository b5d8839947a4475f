"""QuEST: a UNet of few bits, tuned where it suffers most to give what it gave in full precision.

Wang et al., "QuEST: Low-bit Diffusion Model Quantization via Efficient Selective Finetuning", 2024, arXiv 2402.03666,
section 3.3: first the layers that take up time, at one noise level after the other, then those that suffer most from
few bits, and the steps of all inputs, at all levels; the loss is

    sum over the chosen layers of |y_q - y|^2  +  |f_q(x_t, t) - f(x_t, t)|^2     (means, along the sampler's way)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion.trajectory import Keep, Start, rollout
from visiontune.errors import UserError
from visiontune.models.low_bits import Bits, LowBits
from visiontune.schema import option

TIME = r"time_embedding\.linear_\d|.+\.time_emb_proj"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How much is tuned; rates and numbers of steps are for pocket/sd."""

    time_steps: int = option(3, least=0, greatest=100_000, help="of the layers of time, at each noise level")
    steps: int = option(100, least=0, greatest=1_000_000, help="of the layers that suffer, over all noise levels")
    sensitive: str = option(
        r".+\.(ff\.net|attn\d)\..+",
        help="pattern of the layers that are tuned at all levels; the authors' are those of ff.net alone",
    )
    lr: float = option(3e-4, above=0, greatest=1, help="of weights, by Adam; 1e-5 for full-size models")
    step_lr: float = option(
        3e-3, above=0, greatest=1, help="of steps, by Adam, as a share of each; 1e-4 for full-size models"
    )
    rows: int = option(8, least=1, greatest=4096, help="states of a step")


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """States of one noise level: x [n, c, h, w] with their conditions, at timestep t."""

    x: Tensor
    t: float
    cond: Condition

    def rows(self, count: int, rng: torch.Generator) -> Seen:
        """Some of them."""
        chosen = torch.randperm(len(self.x), generator=rng)[:count]
        return Seen(x=self.x[chosen], t=self.t, cond=self.cond[chosen])


@torch.no_grad()
def trajectories(model: Any, prompts: Sequence[str], steps: int, cfg_scale: float, seed: int) -> list[Seen]:
    """States of the family's sampler in full precision, one entry a step, with both sides of guidance."""
    cond, uncond = model.embed(prompts), model.unconditional(len(prompts))
    start = Start(generator=torch.Generator().manual_seed(seed))
    found = rollout(model, cond, guidance=model.guidance(cfg_scale), chain=steps, start=start, keep=Keep(history=True))
    assert found.latents is not None
    both = Condition.cat([cond, uncond])
    return [Seen(x=torch.cat([found.latents[:, i]] * 2), t=float(t), cond=both) for i, t in enumerate(found.timesteps)]


def quantised(model: Any, bits: Bits, seen: Sequence[Seen], rows: int = 16) -> LowBits:
    """Round a model's UNet, with steps of inputs from the ranges that are seen."""
    low = LowBits(model, bits, [one.t for one in seen])
    with torch.no_grad(), low.watching():
        for one in seen:
            for part in range(0, len(one.x), rows):
                predicted(model, Seen(x=one.x[part : part + rows], t=one.t, cond=one.cond[slice(part, part + rows)]))
    return low


def predicted(model: Any, seen: Seen) -> Tensor:
    """The network's prediction of states."""
    found: Tensor = model.predict(seen.x, torch.full((len(seen.x),), seen.t), seen.cond)
    return found


@torch.no_grad()
def gap(model: Any, teacher: Any, seen: Sequence[Seen]) -> float:
    """Mean squared difference from the prediction in full precision, over states of all levels."""
    errors = [(predicted(model, one) - predicted(teacher, one)).square().mean() for one in seen]
    return float(torch.stack(errors).mean())


@torch.no_grad()
def sensitivity(low: LowBits, teacher: Any, seen: Sequence[Seen]) -> dict[str, float]:
    """The gap that each layer makes if it alone is rounded, the largest first."""
    found = {}
    for name in low.layers:
        with low.only(name):
            found[name] = gap(low.model, teacher, seen)
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def tune(
    low: LowBits,
    teacher: Any,
    seen: Sequence[Seen],
    tuning: Tuning,
    seed: int = 0,
    each: Callable[[str, int, float], None] = lambda stage, step, loss: None,
) -> list[str]:
    """Tune a rounded model's chosen layers and the steps of inputs; nothing else is changed.

    Args:
        teacher: the same model in full precision, of its own.
        each: told the stage (time or all), the number of every step, and its loss.

    Returns:
        The names of the layers whose weights were tuned.

    Raises:
        UserError: no layer is called as ``tuning.sensitive`` says.
    """
    time = [name for name in low.layers if re.fullmatch(TIME, name)]
    sensitive = [name for name in low.layers if re.fullmatch(tuning.sensitive, name) and name not in time]
    if not sensitive:
        raise UserError(f"sensitive='{tuning.sensitive}' is no pattern of a layer's name: {next(iter(low.layers))}")
    rng = torch.Generator().manual_seed(seed)
    others = [name for name in low.inputs if name not in time]
    _stage(low, teacher, [[one] * tuning.time_steps for one in seen], (time, time), tuning, rng, "time", each)
    levels = torch.randint(len(seen), (tuning.steps,), generator=rng).tolist()
    _stage(low, teacher, [[seen[level] for level in levels]], (sensitive, others), tuning, rng, "all", each)
    return [*time, *sensitive]


def _stage(
    low: LowBits,
    teacher: Any,
    rounds: Sequence[Sequence[Seen]],
    names: tuple[Sequence[str], Sequence[str]],
    tuning: Tuning,
    rng: torch.Generator,
    stage: str,
    each: Callable[[str, int, float], None],
) -> None:
    """Tune weights and steps of some layers; each round begins with an optimiser of its own."""
    weights = [low.weight(name).requires_grad_(True) for name in names[0]]
    steps = [low.inputs[name].step for name in names[1] if name in low.inputs]
    # Adam moves by its rate, and steps are of many sizes: what is trained is the logarithm.
    logs = [step.detach().log().requires_grad_() for step in steps]
    done = 0
    for states in rounds:
        optimiser = torch.optim.Adam([{"params": weights, "lr": tuning.lr}, {"params": logs, "lr": tuning.step_lr}])
        for one in states:
            loss = _matched(low, teacher, one.rows(tuning.rows, rng), names[0])
            grads = torch.autograd.grad(loss, [*weights, *steps], allow_unused=True)
            for weight, grad in zip(weights, grads, strict=False):
                weight.grad = grad
            for log, step, grad in zip(logs, steps, grads[len(weights) :], strict=True):
                log.grad = None if grad is None else grad * step.detach()
            optimiser.step()
            with torch.no_grad():
                for log, step in zip(logs, steps, strict=True):
                    step.copy_(log.exp())
            done += 1
            each(stage, done, float(loss.detach()))
    for weight in weights:
        weight.requires_grad_(False).grad = None


def _matched(low: LowBits, teacher: Any, seen: Seen, names: Sequence[str]) -> Tensor:
    """The loss of a few states."""
    with torch.no_grad(), _outputs(teacher.denoiser, names) as wanted:
        target = predicted(teacher, seen)
    with _outputs(low.model.denoiser, names) as found:
        loss = (predicted(low.model, seen) - target).square().mean()
        return loss + sum(((found[name] - wanted[name]).square().mean() for name in names), loss.new_zeros(()))


@contextmanager
def _outputs(network: Any, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What some layers give in the calls of the block; a dict that is filled."""
    found: dict[str, Tensor] = {}
    layers = {name: network.get_submodule(name) for name in names}

    def keep(name: str) -> Any:
        return lambda layer, args, output: found.__setitem__(name, output)

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
