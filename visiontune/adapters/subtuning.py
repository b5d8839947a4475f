"""SubTuning: training of all weights of a few blocks, found by trying which of them help the task most.

Kaplun et al., "Less is More: Selective Layer Finetuning with SubTuning", arXiv 2302.06354: greedy forward selection.

    S_0 = {},   S_{k+1} = S_k + {b*},   b* = argmin over the blocks b of V(S_k + {b})
    until V(S_k) - V(S_{k+1}) <= gain V(S_0), or the budget pays for no further block

V(S) is the loss on the second half of the batches after the layers of S were trained on the first half for a few steps
of Adam, each time from the base. V of single blocks is the paper's finetuning profile; with ``profile`` blocks are
taken in its order. The chosen layers then train like those of ``dense``,

    W' = W + scale D,   b' = b + scale d,   D and d start at zero

and the others are the base's. The trials train such differences too, so the base's weights are never written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visiontune.adapters import dense
from visiontune.adapters._evidence import Evidence
from visiontune.adapters._slots import Slot
from visiontune.adapters.base import Method
from visiontune.errors import UserError
from visiontune.schema import option

LAYERS = dense.LAYERS


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of SubTuning; at most budget x as many parameters as the layers have."""

    budget: float = option(
        0.25, above=0, greatest=1, help="the most to train, as a share of the weights of each component's layers"
    )
    gain: float = option(
        1e-3,
        least=0,
        greatest=1e6,
        help="the least that a block must take off the held-out loss, as a share of the base's",
    )
    level: int = option(
        0,
        least=0,
        greatest=64,
        help="numbers in a block's name, from the left; 0: all, so the innermost numbered modules",
    )
    profile: bool = option(False, help="try each block once and alone, and take the best: one round instead of many")
    probe_steps: int = option(16, least=1, greatest=1_000_000, help="steps of each trial")
    probe_lr: float = option(1e-5, above=0, greatest=100, help="learning rate of the trials (Adam)")
    batches: int = option(
        16, least=2, greatest=1_000_000, help="batches to look at: the first half to train on, the second to choose by"
    )
    biases: bool = option(True, help="train the biases of the chosen layers too")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """SubTuning for the layers of one component: all of them until it is prepared.

    Raises:
        UserError: the budget pays for no block.
    """
    return SubTuning(config, layers)


class SubTuning(Method):
    """Changes of the chosen layers of one component."""

    plans = True

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        self.slots = {name: Slot() for name in layers}
        super().__init__(self.slots)
        self.config, self.layers = config, dict(layers)
        self.put(layers)
        sizes = {name: sum(p.numel() for p in slot.parameters()) for name, slot in self.slots.items()}
        self.blocks = blocks_of(layers, config.level)
        self.costs = {block: sum(sizes[name] for name in names) for block, names in self.blocks.items()}
        self.budget = round(config.budget * sum(self.costs.values()))
        # Found here, not after other components were searched.
        least = min(self.costs, key=self.costs.__getitem__)
        if self.costs[least] > self.budget:
            raise UserError(
                f"adapter.budget pays for {self.budget} parameters, and the smallest block, '{least}', has "
                f"{self.costs[least]}: raise it"
            )

    def put(self, names: Collection[str]) -> None:
        """Fresh changes in these layers, none in the others."""
        change = dense.Config(biases=self.config.biases)
        for name, slot in self.slots.items():
            slot.put(dense.Change(change, self.layers[name]) if name in names else None)

    def fit(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """A layer without tensors was not chosen."""
        self.put(saved)

    def prepare(self, evidence: Evidence) -> None:
        """Choose the blocks.

        Raises:
            UserError: no block lowers the held-out loss, or a layer has no part in the loss.
        """

        def held_out(tried: Sequence[str]) -> float:
            return self.trial([name for block in tried for name in self.blocks[block]], evidence)

        kept: Collection[str] = list(self.layers)
        try:
            chosen = select(self.costs, self.budget, held_out, self.config.gain, self.config.profile)
            if not chosen:
                raise UserError(
                    "no block lowers the held-out loss by more than adapter.gain: lower it or adapter.probe_lr, or "
                    "leave the component out of the targets"
                )
            kept = [name for block in chosen for name in self.blocks[block]]
        finally:
            self.put(kept)

    def trial(self, names: Sequence[str], evidence: Evidence) -> float:
        """The held-out loss, summed over batches and processes, after a short training of these layers."""
        middle = len(evidence.losses) // 2
        self.put(names)
        if names:
            self.fine_tune(names, evidence.losses[:middle], evidence.reduce)
        with torch.no_grad():
            losses = torch.stack([loss() for loss in evidence.losses[middle:]])
        return float(evidence.reduce(losses).cpu().double().sum())

    def fine_tune(
        self, names: Sequence[str], losses: Sequence[Callable[[], Tensor]], reduce: Callable[[Tensor], Tensor]
    ) -> None:
        """Adam on the changes of these layers."""
        named = [(name, p) for name in names for p in self.slots[name].parameters()]
        parameters = [p for _, p in named]
        optimizer = torch.optim.Adam(parameters, self.config.probe_lr)
        for step in range(self.config.probe_steps):
            optimizer.zero_grad()
            loss = losses[step % len(losses)]()
            if loss.requires_grad:
                loss.backward(inputs=parameters)
            for name, p in named:
                if p.grad is None:
                    raise UserError(f"layer '{name}' takes no part in the loss: leave it out of adapter.targets")
                p.grad = reduce(p.grad)
            optimizer.step()


def blocks_of(names: Iterable[str], level: int = 0) -> dict[str, list[str]]:
    """Layers by block: a module that its parent numbers, with all of its layers that lie in no deeper such module.

    A list that holds one of the layers itself, as of a feed-forward part, is no list of blocks. A layer in no block
    goes with the others of its module, or stands alone at the top.

    Args:
        names: of the layers.
        level: the most numbers in a block's name; 0 for no limit.
    """
    names = list(names)
    lists = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2].isdigit()}
    blocks: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        ends = [i for i, word in enumerate(words) if word.isdigit() and ".".join(words[:i]) not in lists]
        ends = ends[:level] if level else ends
        block = ".".join(words[: ends[-1] + 1]) if ends else name.rpartition(".")[0] or name
        blocks.setdefault(block, []).append(name)
    return blocks


def select(
    costs: Mapping[str, int],
    budget: int,
    held_out: Callable[[Sequence[str]], float],
    gain: float,
    profile: bool = False,
) -> dict[str, float]:
    """The chosen blocks in order, each with the held-out loss for which it was taken.

    Args:
        costs: of each block. budget: in the same unit.
        held_out: the loss with some blocks trained.
        gain: what each block has to take off it at least, as a share of the loss of the base.
        profile: judge by the losses of single blocks.
    """
    chosen: dict[str, float] = {}
    best = held_out([])
    least = gain * abs(best)
    while True:
        tried = {b: held_out([*chosen, b]) for b, cost in costs.items() if b not in chosen and cost <= budget}
        # A trial that diverged may have no number as its loss.
        better = {b: loss for b, loss in tried.items() if math.isfinite(loss) and best - loss > least}
        for block in sorted(better, key=better.__getitem__)[: None if profile else 1]:
            if costs[block] <= budget:
                chosen[block] = better[block]
                budget -= costs[block]
        if profile or not better:
            return chosen
        best = min(better.values())
