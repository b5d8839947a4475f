"""Time and memory of training by rewards, in one run on one machine.

    python benchmarks/speed/rewards.py

Back-propagation through the sampler: our walk (sample without a graph, then step by step) beside torch's checkpointing
and beside one graph. Policy gradients: what share of an epoch is sampling, and what makes sampling cheaper. Variants
take turns; a ratio is the median over rounds. Peaks are the allocator's. Everything has random weights, since only
sizes matter. Writes ``benchmarks/results/speed_rewards.json`` and ``.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from adapters import TARGETS, oft_config, peft, unet
from diffusers import AutoencoderKL
from measure import Step, peak, ratios
from report import main, row
from torch import Tensor, nn

from visiontune.adapters import attach
from visiontune.adapters.base import AdapterSet
from visiontune.core import Condition
from visiontune.diffusion.dynamics import DDIM
from visiontune.diffusion.guidance import classifier_free
from visiontune.diffusion.pathwise import backpropagate, end_gradient
from visiontune.diffusion.replay import backpropagate_scores
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Keep, Start, Window, rollout

CFG, STEPS, ROWS = 4.0, 10, 4


class Model:
    """The UNet of ``adapters.py`` with a small decoder and a made-up pair of conditions."""

    device = torch.device("cpu")

    def __init__(self, change: Callable[[nn.Module], Any]) -> None:
        self.unet, inputs = unet()
        self.unet.requires_grad_(False).eval()
        torch.manual_seed(1)
        self.vae = AutoencoderKL(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        ).requires_grad_(False)
        self.tokens = inputs(2 * ROWS)[2]
        self.schedule = _schedule()
        self.adapters = change(self.unet)
        self.trained = [p for p in _parameters(self.adapters, self.unet) if p.requires_grad]
        rng = torch.Generator().manual_seed(0)
        for p in self.trained:  # away from the start, where a factor of zero saves work
            p.data.add_(0.01 * torch.randn(p.shape, generator=rng))

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        return 4, 16, 16

    def chain(self, steps: int, shape: Any) -> tuple[Tensor, Tensor]:
        return self.schedule.timesteps(steps)

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.unet(x_t, t, cond.tokens).sample

    def unconditional(self, count: int) -> Condition:
        return Condition(tokens=self.tokens[:1].expand(count, -1, -1))

    def embed(self, count: int) -> Condition:
        return Condition(tokens=self.tokens[1 : count + 1])

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample

    def start(self, count: int) -> Tensor:
        return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(2))


def _schedule() -> Schedule:
    from diffusers import DDIMScheduler

    return Schedule.from_scheduler(
        DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    )


def _parameters(adapters: Any, net: nn.Module) -> list[nn.Parameter]:
    return list(adapters.parameters()) if isinstance(adapters, AdapterSet) else list(net.parameters())


def lora(net: nn.Module) -> AdapterSet:
    """Our LoRA, as recipes for rewards have it."""
    return attach(net, "lora", targets=TARGETS, rank=8).eval()


def oft(net: nn.Module) -> AdapterSet:
    """Our OFT with rotated weights kept between optimiser steps."""
    return attach(net, "oft", targets=TARGETS, block_size=8, keep_rotated=True).eval()


def peft_oft(net: nn.Module) -> None:
    """PEFT's exact OFT."""
    peft(net, oft_config(8))


def frozen(net: nn.Module) -> None:
    """No adapter, but a shift of what the first adapted layer would read: the least that is trained from there on."""
    first = next(m for n, m in net.named_modules() if n.endswith(TARGETS[0]))
    first.register_parameter("shift", shift := nn.Parameter(torch.zeros(first.in_features)))
    first.register_forward_pre_hook(lambda _, args: (args[0] + shift,))


def loss_of(model: Model) -> Callable[[Tensor], Tensor]:
    """A stand-in for decoder and reward."""
    return lambda latents: -model.decode(latents).sigmoid().mean()


def walk(model: Model, rows: int, steps: int, way: str) -> Step:
    """One back-propagation through all steps of the sampler: ``deferred``, ``checkpoint`` or ``graph``."""
    cond, start, loss = model.embed(rows), model.start(rows), loss_of(model)

    def step() -> None:
        for p in model.trained:
            p.grad = None
        window = Window(steps=steps, checkpoint=way == "checkpoint", deferred=way == "deferred")
        guidance = classifier_free(CFG)
        made = rollout(model, cond, guidance=guidance, chain=steps, start=Start(latents=start), window=window)
        if way == "deferred":
            backpropagate(model, made, end_gradient(made.final, loss)[1])
        else:
            loss(made.final).backward()
        _touch(model)

    return step


def _touch(model: Model) -> None:
    """What an optimiser does to caches that are kept per version of the parameters."""
    with torch.no_grad():
        for p in model.trained:
            p.mul_(1.0)


def gradient(step: Step, model: Model) -> list[Tensor]:
    """The gradients that a step leaves."""
    step()
    return [p.grad.clone() for p in model.trained if p.grad is not None]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest deviation in units of the largest entry."""
    most = max(float(g.abs().max()) for g in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / most


# ---------------------------------------------------------------------------------------------------- the goals


def goal_9(rounds: int) -> Iterator[dict]:
    """The walk against torch's checkpointing."""
    for rows in (1, ROWS):
        model = Model(lora)
        steps = {way: walk(model, rows, STEPS, way) for way in ("checkpoint", "deferred", "graph")}
        measured = ratios(steps, "checkpoint", rounds)
        yield row(9, f"walk / checkpointing, time, {rows} rows", measured["deferred"], 0.92)
        yield row(9, f"one graph / checkpointing, time, {rows} rows", measured["graph"])
        # Equal means to a percent: the walk's own few small tensors count too.
        held = {way: peak(steps[way]) for way in ("checkpoint", "deferred")}
        yield row(9, f"walk / checkpointing, peak, {rows} rows", held["deferred"] / held["checkpoint"], 1.01)
        found = [gradient(steps[way], model) for way in ("deferred", "checkpoint")]
        yield row(9, f"walk - checkpointing, largest difference of a gradient, {rows} rows", difference(*found), 0.0)


def goal_10() -> Iterator[dict]:
    """The walk's peak against one graph, and how it grows with the number of steps."""
    model = Model(lora)
    held = {n: peak(walk(model, 1, n, "deferred")) for n in (10, 25, 50)}
    yield row(10, "walk / one graph, peak, 10 steps", held[10] / peak(walk(model, 1, 10, "graph")), 0.12)
    yield row(10, "walk, peak with 50 steps / with 10", held[50] / held[10], 1.05)
    yield row(10, "walk, peak with 25 steps / with 10", held[25] / held[10], 1.05)


def goal_4(rounds: int) -> Iterator[dict]:
    """Ten steps with our OFT and walk against PEFT's exact OFT with checkpointing."""
    for rows in (1, ROWS):
        changes = {"peft": peft_oft, "oft": oft, "lora": lora, "frozen": frozen}
        models = {name: Model(change) for name, change in changes.items()}
        steps = {
            name: walk(m, rows, STEPS, "checkpoint" if name == "peft" else "deferred") for name, m in models.items()
        }
        measured = ratios(steps, "peft", rounds)
        yield row(4, f"OFT and walk / PEFT's exact OFT and checkpointing, {rows} rows", measured["oft"], 0.70)
        yield row(4, f"LoRA and walk / PEFT's exact OFT and checkpointing, {rows} rows", measured["lora"])
        yield row(4, f"no adapter and walk / PEFT's exact OFT and checkpointing, {rows} rows", measured["frozen"])


def sampling(rounds: int) -> Iterator[dict]:
    """What of a policy-gradient epoch is sampling, and what makes sampling cheaper; there are no goals for these."""
    model = Model(oft)
    noisy = DDIM(eta=1.0)

    def sample(m: Model = model, rows: int = ROWS, cfg: float = CFG, dynamics: DDIM = noisy) -> Any:
        with torch.no_grad():
            made = rollout(
                m,
                m.embed(rows),
                guidance=classifier_free(cfg),
                chain=STEPS,
                dynamics=dynamics,
                start=Start(latents=m.start(rows)),
                keep=Keep(log_probs=True),
            )
            m.decode(made.final)
        return made

    made = sample()
    weights = torch.ones(ROWS, int(made.scored.sum()))

    def train() -> None:
        backpropagate_scores(model, made, weights)
        for p in model.trained:
            p.grad = None
        _touch(model)

    measured = ratios({"train": train, "sample": sample}, "train", rounds)
    for epochs in (1, 4):
        share = measured["sample"] / (measured["sample"] + epochs)
        yield row(0, f"policy gradient, share of sampling with {epochs} updates of all steps a rollout", share)

    merged = Model(oft)
    merged.adapters.merge()
    unkept = Model(lambda net: attach(net, "oft", targets=TARGETS, block_size=8).eval())
    plain, theirs = Model(lora), Model(peft_oft)

    def one_by_one() -> None:
        for _ in range(ROWS):
            sample(rows=1)

    steps: dict[str, Step] = {
        f"{ROWS} rows at once": sample,
        "one by one": one_by_one,
        "without guidance": lambda: sample(cfg=1.0),
        "merged": lambda: sample(merged),
        "rotated weights not kept": lambda: sample(unkept),
        "LoRA": lambda: sample(plain),
        "PEFT's exact OFT": lambda: sample(theirs),
    }
    measured = ratios(steps, f"{ROWS} rows at once", rounds)
    for name, value in measured.items():
        if value != 1:
            yield row(0, f"sampling, {name} / {ROWS} rows at once, guided, OFT with rotated weights kept", value)


def measure(rounds: int) -> list[dict]:
    """Everything in the table."""
    return [*goal_10(), *goal_9(rounds), *goal_4(rounds), *sampling(rounds)]


if __name__ == "__main__":
    main("speed_rewards", __doc__, measure)
