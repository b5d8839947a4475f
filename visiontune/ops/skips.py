"""ScaleLong: a UNet whose long skips count the less the deeper they are, while it is trained and ever after.

Huang et al., 2023, arXiv 2310.13545, constant scaling: of N long skips, counted from the outermost, number i is scaled
by kappa ** (i - 1) where it is taken, with what a ControlNet has added to it. The network's configuration says kappa.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

# In the configuration of a diffusers network, which keeps entries that its class does not know; and its attribute here.
ENTRY, _SCALING = "skip_scale", "visiontune_skips"
TAKEN = "res_hidden_states_tuple"


class Scaling:
    """Hooks before the stages that take long skips, in training and evaluation, within gradient checkpoints or not.

    Attributes:
        kappa: of now. opened: of the checkpoint, which is what the untrained network has.
    """

    def __init__(self, stages: Sequence[nn.Module], kappa: float, opened: float) -> None:
        self.kappa, self.opened = kappa, opened
        self._exponents: dict[nn.Module, tuple[int, ...]] = {}
        counts: list[int] = [len(stage.resnets) for stage in stages]  # type: ignore[arg-type]
        left = sum(counts)
        for stage, count in zip(stages, counts, strict=True):
            # Within a stage the last of the tuple is taken first, and is the deepest: exponents rise along the tuple.
            self._exponents[stage] = tuple(range(left - count, left))
            left -= count
            stage.register_forward_pre_hook(self._scale, with_kwargs=True)

    def _scale(
        self, stage: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if self.kappa == 1:
            return None
        pairs = zip(kwargs[TAKEN], self._exponents[stage], strict=True)
        return args, {**kwargs, TAKEN: tuple(skip * self.kappa**exponent for skip, exponent in pairs)}


def scale(unet: nn.Module, stages: Sequence[nn.Module], kappa: float, opened: float = 1.0) -> None:
    """Have a UNet's long skips scaled from now on, and its configuration say so.

    Args:
        stages: that take long skips as ``res_hidden_states_tuple``, in the order of evaluation.
        kappa: above 0, at most 1.
        opened: kappa of the checkpoint that its weights are from.
    """
    setattr(unet, _SCALING, Scaling(stages, kappa, opened))
    unet.register_to_config(**{ENTRY: kappa})  # type: ignore[operator]


def kappa_of(networks: Iterable[nn.Module]) -> float:
    """Kappa of the first of some networks whose skips are scaled; 1 where none are, whatever a configuration says."""
    return next((getattr(one, _SCALING).kappa for one in networks if hasattr(one, _SCALING)), 1.0)


@contextmanager
def as_opened(networks: Iterable[nn.Module]) -> Iterator[None]:
    """In the block, long skips are scaled as in the checkpoint: a run's own kappa is no part of what a base knew."""
    with ExitStack() as stack:
        for network in networks:
            scaling = getattr(network, _SCALING, None)
            if scaling is not None:
                stack.callback(setattr, scaling, "kappa", scaling.kappa)
                scaling.kappa = scaling.opened
        yield
