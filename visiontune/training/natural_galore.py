"""Natural GaLore: Adam on gradients of matrices that are projected to low rank and divided by their empirical Fisher.

Das, "Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning", arXiv 2410.16029, upon
GaLore (Zhao et al., arXiv 2403.03507). For a matrix [m, n], m <= n, P [m, r] being the leading left singular vectors of
a gradient, taken anew every ``update_proj_gap`` steps, and G [r n, s] the last s of the g since then as columns:

    g = P^T grad,    (lambda I + G G^T)^-1 g = (g - G (lambda I + G^T G)^-1 G^T g) / lambda,    W -= lr scale P Adam(.)

lambda is ``damping`` times the mean squared length of G's columns: it means the same for gradients of every size. A
matrix with m > n is treated as its transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class NaturalGaLore(torch.optim.Optimizer):
    """AdamW in groups without ``rank``; in those with one, two-dimensional weights are projected.

    The state is tensors: r (m + 2 n) + s r n values of a matrix, beside the number of steps.

    Args:
        rank: r, at most the smaller side of a matrix. update_proj_gap: steps between two choices of P, with which the
            history begins anew and the moments do not. scale: of the steps of matrices. history: s, with 0 it is
            GaLore. damping: see the module; large values make it GaLore too.

    Raises:
        ValueError: an option outside of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        history: int = 8,
        damping: float = 1.0,
    ) -> None:
        matrix = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
        fisher = {"history": history, "damping": damping}
        plain = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**plain, **matrix, **fisher})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step along the gradients that there are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * _direction(p.grad, self.state[p], group))
        return loss


def _direction(gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    """What a parameter moves against, in its shape."""
    state["step"] = state.get("step", torch.zeros((), dtype=torch.float64)) + 1
    taken = int(state["step"])
    if group["rank"] is None or gradient.dim() != 2:
        return _adam(gradient, state, taken, group)
    tall = gradient.shape[0] > gradient.shape[1]
    wide = gradient.mT if tall else gradient
    age = (taken - 1) % group["update_proj_gap"]
    if age == 0:
        left = torch.linalg.svd(wide, full_matrices=False)[0]
        state["projection"] = left[:, : group["rank"]].clone(memory_format=torch.contiguous_format)
    low = state["projection"].mT @ wide
    if group["history"]:
        low = _divided(low, state, age, group)
    moved = group["scale"] * (state["projection"] @ _adam(low, state, taken, group))
    return moved.mT if tall else moved


def _divided(low: Tensor, state: dict[str, Any], age: int, group: Mapping[str, Any]) -> Tensor:
    """The projected gradient, divided by the Fisher of the last ones, of which it is the newest."""
    length = group["history"]
    if "history" not in state:
        state["history"] = low.new_zeros(length, low.numel())
    state["history"][age % length] = low.flatten()
    rows = state["history"][: min(age + 1, length)]
    damping = group["damping"] * rows.square().sum(1).mean()
    # Where all gradients are zero there is nothing to divide.
    return inverse_fisher(rows, low.flatten(), damping).view_as(low) if damping > 0 else low


def inverse_fisher(rows: Tensor, g: Tensor, damping: Tensor) -> Tensor:
    """``(damping I + G G^T)^-1 g`` for G with the columns ``rows`` [s, d], by a system of s equations (Woodbury)."""
    small = rows @ rows.mT
    small.diagonal().add_(damping)
    return (g - rows.mT @ torch.linalg.solve(small, rows @ g)) / damping


def _adam(g: Tensor, state: dict[str, Any], taken: int, group: Mapping[str, Any]) -> Tensor:
    """Adam's direction, without bias towards the zeros that its moments start from."""
    first, second = group["betas"]
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
    mean = state["exp_avg"].lerp_(g, 1 - first) / (1 - first**taken)
    square = state["exp_avg_sq"].mul_(second).addcmul_(g, g, value=1 - second) / (1 - second**taken)
    return mean / square.sqrt().add_(group["eps"])


def _check(group: Mapping[str, Any]) -> None:
    ranges = {
        "lr": (float, 0.0, True),
        "eps": (float, 0.0, True),
        "weight_decay": (float, 0.0, True),
        "scale": (float, 0.0, False),
        "damping": (float, 0.0, False),
        "rank": (int, 1, True),
        "update_proj_gap": (int, 1, True),
        "history": (int, 0, True),
    }
    for name, (kind, least, inclusive) in ranges.items():
        value = group[name]
        if name == "rank" and value is None:
            continue
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not number or not (least <= value if inclusive else least < value) or value == float("inf"):
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name}={value!r}: give {what} {'of at least' if inclusive else 'above'} {least}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']!r}: give two numbers in [0, 1)")
