"""Prompts without pictures, for models that are trained on what they draw themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from visiontune import catalogue
from visiontune.core import Batch
from visiontune.data.base import Config, substitute
from visiontune.data.prompt_files import is_list, read_prompts
from visiontune.data.readers import read
from visiontune.errors import UserError
from visiontune.schema import from_mapping, option


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """A ``datasets/*.yaml`` file with ``source: prompts``."""

    source: Literal["prompts"] = option("prompts", help="that it has no pictures")
    prompts: list[str] = option(help="the prompts; [class] and [trigger] are put in")
    licence: str = option("", help="licence of the texts")
    description: str = option("", help="one line for the catalogue's table")


def read_data_prompts(config: Config) -> list[str]:
    """The prompts of a ``.txt`` or ``.jsonl`` file or of a catalogue entry, or the captions of any other dataset.

    Each comes once, with ``[trigger]`` and ``[class]`` put in.

    Raises:
        UserError: further subjects or sources, no such file or dataset, an empty prompt, or in a file the same prompt
            twice.
    """
    for name in ("subjects", "mix"):
        if getattr(config, name):
            raise UserError(
                f"data.{name} are learnt of pictures, and this objective learns from prompts: leave them out"
            )
    words = read_prompts(config.root) if is_list(config.root) else listed_prompts(config.root)
    if words is not None:
        return check_prompts([substitute(p, config.trigger, config.class_noun) for p in words], config.root)
    # Captions repeat where pictures do; as prompts they count once.
    return check_prompts(list(dict.fromkeys(sample.caption for sample in read(config))), f"data.root {config.root}")


def listed_prompts(name: str) -> list[str] | None:
    """The prompts of a catalogue entry of them, as they are written there; ``None`` for any other dataset."""
    if name not in catalogue.names("datasets"):
        return None
    spec = catalogue.load("datasets", name)
    return from_mapping(PromptSpec, spec, f"datasets/{name}.yaml").prompts if spec.get("source") == "prompts" else None


def check_prompts(prompts: Sequence[str], source: str) -> list[str]:
    """The prompts, refused if one is empty or comes twice: both would skew what is compared within a prompt.

    Raises:
        UserError: naming the first few.
    """
    empty = [str(i) for i, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if empty:
        raise UserError(f"{source} has empty prompts ({', '.join(empty[:5])}): remove them")
    twice = [prompt for prompt, count in Counter(prompts).items() if count > 1]
    if twice:
        more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise UserError(f"{source} has '{twice[0]}'{more} more than once: keep each prompt once")
    if not prompts:
        raise UserError(f"{source} has no prompts: write one a line")
    return list(prompts)


def hold_out(prompts: Sequence[str], count: int, seed: int) -> tuple[list[str], list[str]]:
    """The prompts to train on and ``count`` others, chosen by the seed; both in the order of the list.

    Raises:
        UserError: nothing would be left to train on.
    """
    if count >= len(prompts):
        raise UserError(
            f"guards.holdout={count} leaves none of {len(prompts)} prompts to train on: lower it, or set guards.prompts"
        )
    held = set(np.random.default_rng([seed % 2**64, len(prompts)]).permutation(len(prompts))[:count].tolist())
    return [p for i, p in enumerate(prompts) if i not in held], [prompts[i] for i in sorted(held)]


class PromptBatches:
    """Batches of prompts, each prompt ``group`` times in a row; batch ``k`` is a pure function of ``k`` and the seed.

    The prompts are an endless stream of shuffled passes. A step takes the next ``world * batch_size / group`` of them;
    a group stays on one rank, and the ranks together see what one process with the whole batch would see. A pass leaves
    out what does not fill a step, so that no step has a prompt twice unless it has more places than there are prompts.

    Args:
        prompts: no two alike.
        batch_size: pictures of a step, for each rank; a multiple of ``group``.
        group: pictures of each prompt.
        seed: any integer. rank: this process. world: number of processes.
    """

    def __init__(
        self, prompts: Sequence[str], batch_size: int, group: int = 1, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % group:
            raise UserError(
                f"train.batch_size={batch_size} holds no whole groups: take a multiple of objective.group={group}"
            )
        self.prompts, self.batch_size, self.group = list(prompts), batch_size, group
        self.seed, self.rank, self.world = seed % 2**64, rank, world
        count = len(self.prompts)
        self._pass = count - count % (world * batch_size // group) or count

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, step: int) -> Batch:
        """Rows without pictures: prompts, and the numbers of rows and prompts as ``data``."""
        here = self.batch_size // self.group
        start = (step * self.world + self.rank) * here
        chosen = [self._prompt(place) for place in range(start, start + here) for _ in range(self.group)]
        return Batch(
            prompts=[self.prompts[i] for i in chosen],
            data={"row": torch.arange(len(chosen)) + self.rank * self.batch_size, "prompt": torch.tensor(chosen)},
            cond=None,
            weight=torch.ones(len(chosen)),
            prior=torch.zeros(len(chosen), dtype=torch.bool),
            ids=[str(i) for i in chosen],
        )

    def close(self) -> None:
        """Nothing works ahead here."""

    def _prompt(self, place: int) -> int:
        epoch, within = divmod(place, self._pass)
        return int(_shuffled(self.seed, epoch, len(self.prompts))[within])


@lru_cache(maxsize=64)
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
