"""Time and memory of the adapters beside PEFT's, in one run on one machine.

    python benchmarks/speed/adapters.py

Variants take turns; a ratio is the median over rounds. Peaks are the allocator's. Everything has random weights, since
only sizes matter. Writes ``benchmarks/results/speed_adapters.json`` and ``.md``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from measure import Step, operations, peak, ratios
from peft import BOFTConfig, LoraConfig, OFTConfig, ShiraConfig, inject_adapter_in_model
from report import main, row
from torch import Tensor, nn

from visiontune.adapters import attach
from visiontune.adapters._cayley import rotations
from visiontune.adapters.oft import orthogonality_error

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
MIB = 2**20


# ---------------------------------------------------------------------------------------------------- models


def unet() -> tuple[nn.Module, Callable[[int], tuple]]:
    """A UNet of Stable Diffusion's build, and its inputs for a batch size."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=8,
        norm_num_groups=32,
    )
    return model, lambda b: (torch.randn(b, 4, 16, 16), torch.full((b,), 500), torch.randn(b, 24, 128))


def sd3() -> tuple[nn.Module, Callable[[int], tuple]]:
    """An SD3 transformer, and its inputs for a batch size."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=128,
        caption_projection_dim=192,
        pooled_projection_dim=64,
        out_channels=4,
    )

    def inputs(b: int) -> tuple:
        return torch.randn(b, 4, 16, 16), torch.randn(b, 24, 128), torch.randn(b, 64), torch.full((b,), 500)

    return model, inputs


def block(d: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Callable[[int], tuple]]:
    """One transformer block of a diffusion UNet, and its inputs."""
    torch.manual_seed(0)
    model = BasicTransformerBlock(d, 8, d // 8, cross_attention_dim=d).to(dtype)

    def inputs(b: int) -> tuple:
        x = torch.randn(b, tokens, d, dtype=dtype, requires_grad=True)
        return x, None, torch.randn(b, 24, d, dtype=dtype)

    return model, inputs


# ---------------------------------------------------------------------------------------------------- variants


def mine(model: nn.Module, method: str, targets: list[str] | str = TARGETS, **options: Any) -> list[Tensor]:
    """Attach a method of ours and return what it trains."""
    attached = attach(model, method, targets=targets, **options)
    attached.train()
    return list(attached.parameters())


def peft(model: nn.Module, config: Any) -> list[Tensor]:
    """Inject a method of PEFT's and return what it trains."""
    inject_adapter_in_model(config, model)
    return [p for p in model.parameters() if p.requires_grad]


def masked(model: nn.Module, targets: list[str], share: float) -> list[Tensor]:
    """Full fine-tuning of the targets whose gradient is masked to a share of the entries."""
    model.requires_grad_(False)
    chosen = [m.weight.requires_grad_() for n, m in model.named_modules() if n in targets]
    for weight in chosen if share < 1 else ():
        mask = (torch.rand(weight.shape) < share).to(weight)
        weight.register_hook(lambda g, mask=mask: g * mask)
    return chosen


def first(model: nn.Module, targets: list[str]) -> list[Tensor]:
    """Train one target's weight, the first: what any method costs that reaches as far back and adds nothing."""
    model.requires_grad_(False)
    layer = next(m for n, m in model.named_modules() if any(n.endswith(t) for t in targets))
    return [layer.weight.requires_grad_()]


def stepper(model: nn.Module, inputs: tuple, trained: list[Tensor], optimise: bool = True) -> Step:
    """One training step: forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    rng = torch.Generator().manual_seed(0)
    for p in trained:  # away from the start, where a factor of zero saves work
        p.data.add_(0.01 * torch.randn(p.shape, generator=rng).to(p))

    def step() -> None:
        out = model(*inputs)
        out = out.sample if hasattr(out, "sample") else out
        out.float().square().mean().backward()
        if optimise:
            optimizer.step()
        optimizer.zero_grad()
        for value in inputs:
            if isinstance(value, Tensor):
                value.grad = None

    return step


def steps_of(
    base: nn.Module, inputs: tuple, variants: dict[str, Callable[[nn.Module], list[Tensor]]], **options: Any
) -> dict[str, Step]:
    """A training step of each variant, on copies of one model."""
    made = {}
    for name, change in variants.items():
        model = copy.deepcopy(base)
        made[name] = stepper(model, inputs, change(model), **options)
    return made


def oft_config(b: int, **options: Any) -> OFTConfig:
    """PEFT's exact OFT."""
    return OFTConfig(r=0, oft_block_size=b, target_modules=TARGETS, use_cayley_neumann=False, **options)


def boft_config() -> BOFTConfig:
    """PEFT's BOFT of four factors."""
    return BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=4, target_modules=TARGETS)


# ---------------------------------------------------------------------------------------------------- the goals


def goal_1(rounds: int) -> Iterator[dict]:
    """OFT's training step against PEFT's exact one."""
    for label, (model, inputs), b in (("UNet, batch 1, b 8", unet(), 8), ("SD3, batch 1, b 32", sd3(), 32)):
        steps = steps_of(
            model,
            inputs(1),
            {
                "peft": lambda m, b=b: peft(m, oft_config(b)),
                "oft": lambda m, b=b: mine(m, "oft", block_size=b, keep_rotated=True),
                "lora": lambda m: mine(m, "lora", rank=16),
                "one weight": lambda m: first(m, TARGETS),
            },
        )
        measured = ratios(steps, "peft", rounds)
        yield row(1, f"OFT step / PEFT's exact OFT: {label}", measured["oft"], 0.80)
        yield row(1, f"LoRA r 16 step / PEFT's exact OFT: {label}", measured["lora"])
        yield row(1, f"step of one weight alone / PEFT's exact OFT: {label}", measured["one weight"])
    model, inputs = block(640, 1024)
    steps = steps_of(
        model,
        inputs(1),
        {"peft": lambda m: peft(m, oft_config(32)), "oft": lambda m: mine(m, "oft", keep_rotated=True)},
    )
    yield row(1, "OFT step / PEFT's exact OFT: block d 640, 1024 tokens", ratios(steps, "peft", rounds)["oft"], 1.05)


def goal_2() -> Iterator[dict]:
    """Operations that OFT adds for each linear layer, forward and backward."""
    model, inputs = unet()
    frozen = copy.deepcopy(model).requires_grad_(False)
    conv_in = [frozen.conv_in.weight.requires_grad_()]
    plain = operations(stepper(frozen, inputs(1), conv_in, optimise=False))
    for name, change in (
        ("visiontune", lambda m: mine(m, "oft", block_size=8)),
        ("PEFT", lambda m: peft(m, oft_config(8))),
    ):
        other = copy.deepcopy(model)
        trained = change(other)
        layers = sum(any(n.endswith(t) for t in TARGETS) for n, _ in model.named_modules())
        other.conv_in.requires_grad_()
        added = operations(stepper(other, inputs(1), trained, optimise=False)) - plain
        yield row(
            2, f"operations added for each linear layer, {name}", added / layers, 6 if name == "visiontune" else None
        )


def goal_3() -> Iterator[dict]:
    """How orthogonal rotations are when trained hard, and a 3x3 convolution at identity."""
    rng = torch.Generator().manual_seed(0)
    for b in (8, 32, 64):
        v = 0.1 * torch.randn(16, b * (b - 1) // 2, generator=rng)
        yield row(
            3, f"OFT's orthogonality error, entries of std 0.1, b {b}", orthogonality_error(rotations(v, b)), 1e-5
        )
    conv, x = nn.Conv2d(16, 16, 3, padding=1), torch.randn(2, 16, 8, 8, generator=rng)
    expected = conv(x)
    attach(conv_net := nn.Sequential(conv), "oft", targets=["0"], block_size=8)
    yield row(3, "OFT's 3x3 convolution at identity, largest error", float((conv_net(x) - expected).abs().max()), 0.0)


def goal_5(rounds: int) -> Iterator[dict]:
    """BOFT against LoRA where tokens are many."""
    for d, tokens in ((320, 1024), (640, 1024), (1280, 1024)):
        model, inputs = block(d, tokens)
        steps = steps_of(
            model,
            inputs(1),
            {
                "lora": lambda m: mine(m, "lora", rank=16),
                "boft 2": lambda m: mine(m, "boft", block_size=8, factors=2),
                "boft 4": lambda m: mine(m, "boft", block_size=8, factors=4),
                "peft": lambda m: peft(m, boft_config()),
            },
        )
        measured = ratios(steps, "lora", rounds)
        yield row(5, f"PEFT's BOFT step, 4 factors / LoRA r 16: block d {d}, {tokens} tokens", measured["peft"])
        for m in (2, 4):
            yield row(
                5, f"BOFT step, {m} factors / LoRA r 16: block d {d}, {tokens} tokens", measured[f"boft {m}"], 1.5
            )


def goals_6_and_7(rounds: int) -> Iterator[dict]:
    """SaRA at 5 % against masked full fine-tuning and PEFT's SHiRA with as many entries."""
    d, tokens, share = 1280, 256, 0.05
    torch.manual_seed(0)
    model = nn.Sequential(*[m for i in range(8) for m in (nn.Linear(d, d), nn.GELU())])
    targets = [str(2 * i) for i in range(8)]
    x = torch.randn(1, tokens, d)
    shira = ShiraConfig(r=round(share * d / 2), target_modules=targets, mask_type="random", random_seed=0)
    variants: dict[str, Callable[[nn.Module], list[Tensor]]] = {
        "full": lambda m: masked(m, targets, share),
        "shira": lambda m: peft(m, shira),
        "sara": lambda m: mine(m, "sara", targets, budget=share, biases=False),
    }
    held = {}
    for name, change in variants.items():
        changed = copy.deepcopy(model)
        trained = change(changed)
        states = 2 * sum(p.numel() * 4 for p in trained)
        held[name] = peak(stepper(changed, (x,), trained, optimise=False)) + states
    yield row(6, "SaRA 5 %, peak of a step and Adam / full with mask", held["sara"] / held["full"], 0.25)
    yield row(6, "SaRA 5 %, peak of a step and Adam / SHiRA", held["sara"] / held["shira"], 0.40)
    variants["unmasked"] = lambda m: masked(m, targets, 1.0)
    variants["one weight"] = lambda m: first(m, targets)
    steps = steps_of(model, (x,), variants, optimise=False)
    measured = ratios(steps, "full", rounds)
    yield row(7, "SaRA 5 %, forward and backward / full with mask", measured["sara"], 0.70)
    yield row(7, "full without its mask, forward and backward / with", measured["unmasked"])
    yield row(7, "one weight alone, forward and backward / full with mask", measured["one weight"])


def goal_8() -> Iterator[dict]:
    """Peak of a step on a bf16 base with float32 adapters."""
    model, inputs = block(640, 1024, torch.bfloat16)
    pairs = {
        "LoRA r 16": (
            lambda m: mine(m, "lora", rank=16),
            lambda m: peft(m, LoraConfig(r=16, target_modules=TARGETS)),
        ),
        "OFT b 32": (lambda m: mine(m, "oft", block_size=32), lambda m: peft(m, oft_config(32))),
    }
    for name, (ours, theirs) in pairs.items():
        held = []
        for change in (ours, theirs):
            changed = copy.deepcopy(model)
            trained = change(changed)
            for p in trained:
                p.data = p.data.float()
            held.append(peak(stepper(changed, inputs(1), trained, optimise=False)))
        yield row(8, f"{name} on a bf16 base, peak / PEFT's", held[0] / held[1], 0.82)


def measure(rounds: int) -> list[dict]:
    """Everything in the table."""
    return [*goal_3(), *goal_2(), *goal_8(), *goals_6_and_7(rounds), *goal_1(rounds), *goal_5(rounds)]


if __name__ == "__main__":
    main("speed_adapters", __doc__, measure)
