"""Linear projections of what a text encoder gives, by which attributes find their objects (CLP and WiCLP).

Zarei et al., "Understanding and Mitigating Compositional Issues in Text-to-Image Generative Models", 2024, arXiv
2406.07844. With c_i the features of token i, s = 2 r + 1 tokens in a window, zeros beyond both ends, and all weights
zero at the start,

    g(c)_i = c_i + b + sum over |i - j| <= r of W_(j - i) c_j.

A window of one token is CLP. All else is frozen: g is trained to denoise pictures that are as their captions say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d

from visiontune.core import Batch
from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.models import _fitted
from visiontune.schema import option

_MARK = "visiontune_text_projector"
_TERM = "wiclp"


class TextProjector(nn.Module):
    """g; :meth:`change` is what it adds.

    Args:
        width: d, of a token's features. window: s, odd.
        about: how it was fitted, as the header of its file has it.
    """

    def __init__(self, width: int, window: int = 5, about: dict[str, str] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width, window))
        self.bias = nn.Parameter(torch.zeros(width))
        self.about = dict(about or {})

    @property
    def width(self) -> int:
        """d."""
        return len(self.bias)

    def change(self, tokens: Tensor) -> Tensor:
        """g(c) - c of features ``[b, n, d]``, in their type."""
        across = conv1d(tokens.to(self.weight).mT, self.weight, self.bias, padding="same")
        return across.mT.to(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.change(tokens)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all."""
        return _fitted.save(path, _MARK, self.state_dict(), self.about)

    @staticmethod
    def load(path: str | Path) -> TextProjector:
        """Read a file.

        Raises:
            UserError: there is none, or it is none of a projection, or damaged.
        """
        maker = "pipelines/guidance/wiclp.py"
        tensors, about = _fitted.load(path, _MARK, "projection", maker, ("weight", "bias"))
        weight, bias = tensors["weight"], tensors["bias"]
        fits = weight.ndim == 3 and weight.shape[:2] == (*bias.shape, *bias.shape) and weight.shape[2] % 2 == 1
        if not fits or not weight.isfinite().all() or not bias.isfinite().all():
            raise _fitted.damaged(path, "no finite weights of an odd window")
        found = TextProjector(len(bias), weight.shape[2], about)
        found.load_state_dict(tensors)
        return found


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How a projection is fitted; what is not said is the authors'."""

    window: int = option(5, least=1, greatest=99, help="s, tokens that a token is made of; odd, 1 is CLP")
    steps: int = option(20_000, least=1, greatest=10_000_000, help="of the optimiser")
    lr: float = option(1e-5, above=0, greatest=1, help="of Adam; a tenth of it from half of the steps on, then again")
    clip: float = option(1.0, above=0, greatest=1e6, help="greatest norm of a gradient")

    def __post_init__(self) -> None:
        if self.window % 2 == 0:
            raise UserError(f"window is as wide to the left as to the right, not {self.window}: take an odd one")


def fit(
    model: Any,
    batches: Callable[[int], Batch],
    fitting: Fitting = Fitting(),
    seed: int = 0,
    each: Callable[[int, float], None] = lambda step, loss: None,
) -> TextProjector:
    """A projection that denoises what ``batches(step)`` give under their conditions; nothing of the model is changed.

    Args:
        model: of a family of UNets, on the device that computes.
        batches: with `image` latents and conditions.
        each: told the number of every step, and its loss.

    Raises:
        UserError: the model is no UNet.
    """
    Network.of_model(model).reading(_TERM)
    first = batches(0)
    assert first.cond is not None
    about = {**{name: str(value) for name, value in asdict(fitting).items()}, "model": model.source}
    g = TextProjector(first.cond.tokens.shape[-1], fitting.window, about).to(model.device)
    optimiser = torch.optim.Adam(g.parameters(), lr=fitting.lr)
    falls = [max(1, fitting.steps // 2), max(1, fitting.steps * 4 // 5)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, falls, gamma=0.1)
    rng = torch.Generator().manual_seed(seed)
    for step in range(fitting.steps):
        loss = loss_of(model, g, batches(step).to(model.device), rng)
        optimiser.zero_grad()
        loss.backward(inputs=[*g.parameters()])
        nn.utils.clip_grad_norm_(g.parameters(), fitting.clip)
        optimiser.step()
        schedule.step()
        each(step, float(loss.detach()))
    return g.requires_grad_(False)


def loss_of(model: Any, g: nn.Module, batch: Batch, rng: torch.Generator) -> Tensor:
    """Weighted mean over rows of the squared error under projected words, at uniform timesteps."""
    assert batch.cond is not None
    x_0 = batch.data["image"].float()
    t = torch.randint(model.schedule.num_train_timesteps, (len(x_0),), generator=rng).to(x_0.device)
    noise = torch.randn(x_0.shape, generator=rng).to(x_0)
    cond = replace(batch.cond, tokens=g(batch.cond.tokens))
    pred = model.predict(model.schedule.add_noise(x_0, noise, t), t, cond)
    errors = (pred.float() - model.schedule.target(x_0, noise, t)).square().flatten(1).mean(1)
    return (errors * batch.weight.to(errors)).mean()
