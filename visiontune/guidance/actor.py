"""Fitting the offsets of OneActor (Wang et al., 2024, arXiv 2404.10267) to one picture and its siblings.

A projector phi makes an offset of a word's embedding of what the middle block of the UNet gives, h. It is trained to
denoise the picture with phi(h_target), its siblings, drawn for the same prompt, with phi(h_i), and the picture again
with the mean of these:

    L = mse(target; phi(h_target)) + l1 mse(sibling i; phi(h_i)) + l2 mse(target; mean phi(h_i)).

Drawing needs two vectors of it, phi(h_target) and mean phi(h_i): these are a character, and its file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.core import Condition, Request
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.guidance import _words
from visiontune.guidance._network import Network
from visiontune.guidance._projector import Projector
from visiontune.models import _fitted
from visiontune.schema import option

_MARK = "visiontune_actor"
_TERM = "oneactor"


@dataclass(frozen=True, kw_only=True, eq=False)
class Actor:
    """A character: what its word's embedding gets more.

    Attributes:
        target: [d] of the picture, d being the width of all text encoders together. average: [d], of its siblings.
        word: whose embedding it is. about: how it was fitted, as the header of its file has it.
    """

    target: Tensor
    average: Tensor
    word: str
    about: dict[str, str]

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all."""
        tensors = {"target": self.target, "average": self.average}
        return _fitted.save(path, _MARK, tensors, {**self.about, "word": self.word})

    @staticmethod
    def load(path: str | Path) -> Actor:
        """Read a file.

        Raises:
            UserError: there is none, or it is none of a character, or damaged.
        """
        maker = "visiontune.guidance.actor"
        found, about = _fitted.load(path, _MARK, "character", maker, ("target", "average"), told=("word",))
        target, average = found["target"], found["average"]
        if target.ndim != 1 or target.shape != average.shape or not torch.stack([target, average]).isfinite().all():
            raise _fitted.damaged(path, "no two finite vectors of one width")
        return Actor(target=target, average=average, word=about["word"], about=about)


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How a character is fitted."""

    siblings: int = option(
        10, least=1, greatest=1000, help="pictures drawn of the same prompt, with the seeds after it"
    )
    steps: int = option(200, least=1, greatest=100_000, help="of the optimiser")
    lr: float = option(1e-4, above=0, greatest=1, help="of AdamW")
    weight_decay: float = option(1e-2, least=0, greatest=1, help="of AdamW")
    together: int = option(3, least=1, greatest=1000, help="siblings in a step")
    l1: float = option(0.5, least=0, greatest=100, help="weight of the siblings' error")
    l2: float = option(0.2, least=0, greatest=100, help="weight of the picture's error with the siblings' mean offset")
    templates: tuple[str, ...] = option(
        ("{}", "a {}", "a photo of a {}", "a picture of a {}"), help="prompts of the steps, {} being the word"
    )
    drawing: int = option(30, least=1, greatest=1000, help="sampling steps of the pictures")
    cfg_scale: float = option(7.5, least=1, greatest=1000, help="of the pictures")


@dataclass(frozen=True, eq=False)
class Seen:
    """Pictures [n, c, h, w], scaled latents, and the features [n, k, h, w] of their last step."""

    latents: Tensor
    features: Tensor


@torch.no_grad()
def look(model: Any, prompt: str, seeds: range, fitting: Fitting) -> Seen:
    """Draw pictures of a prompt, one by one, and keep what the middle block gives for the prompt in the last step.

    Raises:
        UserError: the model's network is no UNet.
    """
    (middle,) = Network.of_model(model).stages(_TERM)[1].values()
    latents, features, last = [], [], []
    handle = middle.register_forward_hook(lambda module, args, found: last.append(found[-1:]))
    try:
        cond, uncond, guidance = model.embed([prompt]), model.unconditional(1), model.guidance(fitting.cfg_scale)
        for seed in seeds:
            last.clear()
            start = Start(latents=model.start_noise(Request(prompt=prompt, seed=seed))[None])
            found = rollout(model, cond, uncond=uncond, guidance=guidance, chain=fitting.drawing, start=start)
            latents.append(found.final)
            features.append(last[-1].float())
    finally:
        handle.remove()
    return Seen(torch.cat(latents), torch.cat(features))


def fit(
    model: Any,
    prompt: str,
    word: str,
    seed: int = 0,
    fitting: Fitting = Fitting(),
    each: Callable[[int, float], None] = lambda step, loss: None,
) -> Actor:
    """The character that a word of a prompt is in the picture of a seed; nothing of the model is changed.

    Args:
        model: of a family of UNets, on the device that computes.
        prompt: of the picture, as `draw` takes it. word: of the templates, one or several.
        each: told the number of every step, and its loss.

    Raises:
        UserError: the model is no UNet, or does not read the word in a template.
    """
    seen = look(model, prompt, range(seed, seed + fitting.siblings + 1), fitting)
    texts = _texts(model, word, fitting)
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, channels, height, width = seen.features.shape
        phi = Projector(channels, (height, width), texts[0][0].tokens.shape[-1])
    phi.to(model.device)
    optimiser = torch.optim.AdamW(phi.parameters(), lr=fitting.lr, weight_decay=fitting.weight_decay)
    for step in range(fitting.steps):
        cond, places = texts[int(torch.randint(len(texts), (), generator=rng))]
        loss = loss_of(model, phi, seen, cond, places, fitting, rng)
        optimiser.zero_grad()
        loss.backward(inputs=[*phi.parameters()])
        optimiser.step()
        each(step, float(loss.detach()))
    with torch.no_grad():
        offsets = phi(seen.features)
    about = {name: str(value) for name, value in asdict(fitting).items()}
    about |= {"prompt": prompt, "seed": str(seed), "model": model.source}
    return Actor(target=offsets[0].cpu(), average=offsets[1:].mean(0).cpu(), word=word, about=about)


def loss_of(
    model: Any, phi: nn.Module, seen: Seen, cond: Condition, places: list[int], fitting: Fitting, rng: torch.Generator
) -> Tensor:
    """L of one step; the rows are the picture, some siblings, and the picture again with its own noise.

    Args:
        cond: one row of a template's prompt. places: of the word among its tokens.
    """
    some = 1 + torch.randperm(len(seen.latents) - 1, generator=rng)[: fitting.together]
    rows = torch.cat([torch.tensor([0]), some, torch.tensor([0])])
    offsets = phi(seen.features[rows[:-1]])
    offsets = torch.cat([offsets, offsets[1:].mean(0, keepdim=True)])
    x_0 = seen.latents[rows]
    noise = torch.randn(x_0[:-1].shape, generator=rng)
    noise = torch.cat([noise, noise[:1]]).to(x_0)
    t = torch.randint(model.schedule.num_train_timesteps, (len(rows),), generator=rng).to(x_0.device)
    cond = cond[torch.zeros(len(rows), dtype=torch.long)]
    tokens = _words.added(cond.tokens, [[(at, offset) for at in places] for offset in offsets], "prompt")
    pred = model.predict(model.schedule.add_noise(x_0, noise, t), t, replace(cond, tokens=tokens))
    errors = (pred.float() - model.schedule.target(x_0, noise, t).float()).square().flatten(1).mean(1)
    return errors[0] + fitting.l1 * errors[1:-1].mean() + fitting.l2 * errors[-1]


@torch.no_grad()
def _texts(model: Any, word: str, fitting: Fitting) -> list[tuple[Condition, list[int]]]:
    prompts = [template.format(word) for template in fitting.templates]
    return [(model.embed([prompt]), _words.places(model, prompt, word, _TERM)) for prompt in prompts]
