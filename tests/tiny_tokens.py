"""Models that fill in masked tokens, small enough for exact gradients."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from diffusers import AmusedScheduler
from torch import nn

from visiontune.core import Condition
from visiontune.diffusion.guidance import classifier_free

SIDE, VOCABULARY = 3, 5
TOKENS = SIDE * SIDE


class Free(nn.Module):
    """Tokens that do not depend on each other: what is masked does not matter. Pictures show the tokens' numbers."""

    mask_token, downsample, resolution = 6, 4, 4 * SIDE
    device = torch.device("cpu")
    source = "free"

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(TOKENS, VOCABULARY, generator=seeded(0), dtype=torch.float64))
        self.seen: list[torch.Tensor] = []

    def embed(self, prompts) -> Condition:
        told = torch.tensor([[[float(ord(p[0])) / 100]] if p else [[0.0]] for p in prompts], dtype=torch.float64)
        return Condition(tokens=told)

    def unconditional(self, count: int) -> Condition:
        return self.embed([""] * count)

    def guidance(self, scale):
        return classifier_free(scale)

    def grid(self, height=None, width=None):
        return SIDE, SIDE

    def stepper(self, steps, temperature):
        made = AmusedScheduler(mask_token_id=self.mask_token)
        made.set_timesteps(steps, temperature)
        return made

    def logits(self, tokens, cond):
        self.seen.append(tokens.flatten(1).clone())
        return self.shown(tokens, cond).view(-1, SIDE, SIDE, VOCABULARY)

    def shown(self, tokens, cond):
        return self.table.expand(len(tokens), -1, -1)

    def decode(self, tokens):
        return (tokens[:, None].double() / VOCABULARY * 2 - 1).expand(-1, 3, -1, -1)


class Bound(Free):
    """Tokens that see each other and the condition."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(7, 8).double()
            self.mix = nn.Linear(TOKENS * 8, TOKENS * 8).double()
            self.last = nn.Linear(8, VOCABULARY).double()

    def shown(self, tokens, cond):
        known = self.embedding(tokens.flatten(1)).flatten(1)
        mixed = torch.tanh(known + self.mix(known)).view(len(tokens), TOKENS, 8)
        return self.last(mixed * (1 + cond.tokens)) + self.table


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def move(model, by=0.3, seed=1):
    rng = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype))


def base_of(model, by=-0.4):
    """The model with other weights."""

    @contextmanager
    def reference():
        before = [p.detach().clone() for p in model.parameters()]
        move(model, by, seed=2)
        yield
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), before, strict=True):
                parameter.copy_(value)

    return reference
