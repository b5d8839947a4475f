"""Reward back-propagation in the memory of one denoiser call: sample without a graph, then walk back step by step.

    trajectory = rollout(model, cond, chain=50, window=Window(steps=10, deferred=True))
    loss, at_end = end_gradient(trajectory.final, lambda x: -reward(model.decode(x)).mean())
    backpropagate(model, trajectory, at_end)

gives the gradients of `rollout(..., window=Window(steps=10, checkpoint=True))` followed by `loss.backward()`: the same
chain rule over the same steps, with the decoder's and the reward's graph gone before the first step is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion._window import gradient_window, require_effect
from visiontune.diffusion.replay import latent, stepper
from visiontune.diffusion.trajectory import Sampled, Trajectory
from visiontune.diffusion.transition import kernel


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """What a walk back found beside the parameters' gradients.

    Attributes:
        latents: [b, c, (f), h, w] with respect to the latents where the window began.
        cond, uncond: with respect to tokens and pooled vectors, in a Condition's fields; None where not asked for.
    """

    latents: Tensor
    cond: Condition | None = None
    uncond: Condition | None = None


def end_gradient(final: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A scalar loss of the final latents and its gradient with respect to them; its graph is freed on return.

    Parameters that `loss` itself depends on (a trained decoder's) accumulate their gradients too.
    """
    with torch.enable_grad():
        x = final.detach().requires_grad_()
        value = loss(x)
        value.backward()
    if x.grad is None:
        raise ValueError("the loss does not depend on the latents: is the reward differentiable?")
    return value.detach(), x.grad


@torch.enable_grad()
def backpropagate(
    model: Sampled,
    trajectory: Trajectory,
    grad_final: Tensor,
    window: int | Tensor | None = None,
    *,
    conditions: bool = False,
) -> Gradients:
    """Add to the parameters' gradients those of a loss whose gradient at the end of the chain is `grad_final`.

    Args:
        model: the model of the rollout, with the weights of the rollout.
        trajectory: with history, as a deferred `Window` keeps it.
        grad_final: [b, c, (f), h, w].
        window: as `steps` of `Window`; default the trajectory's.
        conditions: also find the gradients of the conditions, for `into_conditions`.

    Raises:
        UserError: the denoiser has no influence at the steps of the window.
    """
    inside = trajectory.window if window is None else gradient_window(window, trajectory.steps)
    if not inside.any():
        raise ValueError("no step to differentiate: sample with a window, or give one")
    of_x, of_pred, _ = kernel(model.schedule, trajectory.timesteps, trajectory.ends, trajectory.dynamics)
    require_effect(inside, trajectory.timesteps, of_x, of_pred)
    chain = stepper(model, trajectory)
    if conditions:
        chain = replace(chain, cond=leaf_of(chain.cond), uncond=None if chain.uncond is None else leaf_of(chain.uncond))
    grad = grad_final.detach()
    for i in reversed(range(int(inside.int().argmax()), trajectory.steps)):
        if not inside[i]:
            grad = of_x[i].to(grad.dtype).to(grad.device) * grad
            continue
        x = latent(trajectory, i, model.device).requires_grad_()
        # The fresh noise is a constant, and so is its deviation.
        mean, _ = chain.step(i, x)
        mean.backward(grad.to(mean))
        assert x.grad is not None
        grad = x.grad
    if not conditions:
        return Gradients(latents=grad)
    return Gradients(
        latents=grad,
        cond=gradient_of(chain.cond),
        uncond=None if chain.uncond is None else gradient_of(chain.uncond),
    )


def into_conditions(live: Condition, *gradients: Condition | None) -> None:
    """Send a condition's gradients, summed, on to the text encoders that made `live`.

    Nothing happens where none is being trained. The graph of `live` is freed, so what several walks found goes in one
    call.
    """
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        return
    pairs = [(live.tokens, torch.stack([gradient.tokens for gradient in found]).sum(0))]
    pooled = [gradient.pooled for gradient in found if gradient.pooled is not None]
    if live.pooled is not None and pooled:
        pairs.append((live.pooled, torch.stack(pooled).sum(0)))
    pairs = [(value, grad.to(value)) for value, grad in pairs if value.requires_grad]
    if pairs:
        torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])


def leaf_of(cond: Condition) -> Condition:
    """A copy without a graph that gathers gradients, for `gradient_of`."""
    pooled = None if cond.pooled is None else cond.pooled.detach().clone().requires_grad_()
    return replace(cond, tokens=cond.tokens.detach().clone().requires_grad_(), pooled=pooled)


def gradient_of(cond: Condition) -> Condition:
    """The gradients that a `leaf_of` has gathered, for `into_conditions`."""
    return Condition(tokens=_grad(cond.tokens), pooled=None if cond.pooled is None else _grad(cond.pooled))


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
