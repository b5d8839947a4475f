"""Which steps of a chain are differentiated."""

from __future__ import annotations

import torch
from torch import Tensor

from visiontune.errors import UserError


def gradient_window(grad_steps: int | Tensor, steps: int) -> Tensor:
    """[steps] bool on the CPU: the last `grad_steps` steps, or `grad_steps` itself where it is a mask."""
    if isinstance(grad_steps, Tensor):
        if grad_steps.shape != (steps,):
            raise ValueError(f"a gradient mask of shape {tuple(grad_steps.shape)} for {steps} steps")
        return grad_steps.bool().cpu()
    if grad_steps < 0:
        raise ValueError(f"grad_steps must not be negative, got {grad_steps}")
    return torch.arange(steps) >= steps - grad_steps


def require_effect(window: Tensor, start: Tensor, of_x: Tensor, of_pred: Tensor) -> None:
    """Refuse a window through which no gradient comes.

    A DDIM step from timestep 0 to an end of the same level is the identity, whatever the denoiser says: "leading"
    spacing with `steps_offset=0` and `set_alpha_to_one=False` ends with one.

    Args:
        window: [T] bool. start: [T] timesteps. of_x, of_pred: [T] as `transition.kernel` gives them.

    Raises:
        UserError: the result does not depend on the denoiser at any step of the window.
    """
    reach = True
    for inside, x, pred in zip(window.flip(0), of_x.flip(0), of_pred.flip(0), strict=True):
        if inside and reach and abs(float(pred)) > 1e-12:
            return
        # Inside the window gradient also passes through the denoiser.
        reach = reach and (float(x) != 0 or (bool(inside) and float(pred) != 0))
    steps = ", ".join(f"{float(t):g}" for t in start[window])
    raise UserError(
        f"the denoiser has no influence at the steps to differentiate (t = {steps}), so their gradient is zero: raise "
        "grad_steps, or give the model's scheduler timestep_spacing=trailing, steps_offset=1 or set_alpha_to_one=true"
    )
