"""MaxFusion: several controls at once, of which each rules where it speaks loudest.

Nair et al., 2024, arXiv 2404.09977. How much a control says at a place is the variance of its features over channels,
v = var_c / sum var_c. Where features of two controls correlate they are averaged, elsewhere those with the larger v
are taken (`final`). Between the blocks of ControlNets each stream goes on with the other's features where these are
the stronger, rescaled to its own deviation (`inner`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import ControlNetModel, MultiControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from torch import Tensor

from visiontune.errors import UserError
from visiontune.guidance import _controls, control
from visiontune.guidance._controls import Features
from visiontune.guidance._lockstep import check_nets, lockstep
from visiontune.guidance._merging import Rule
from visiontune.guidance._network import Network
from visiontune.guidance.base import Feeding, Point, Run
from visiontune.schema import option

Merge = Literal["full", "final"]


@dataclass(frozen=True, kw_only=True)
class Config(Feeding):
    """Controls that are merged by how much they say, and not added up."""

    scale: float = option(1.0, least=0, greatest=10, help="how much of what they give together is added; 0 is none")
    controls: list[control.Config] = option(help="{net: ..., picture: ...} of each, with scale and window of its own")
    threshold: float = option(0.7, least=-2, greatest=2, help="of the correlation, above which controls are averaged")
    tau: float = option(
        0.0, least=0, greatest=100, help="softens the choice of the stronger one: softmax(log v / tau); 0 is hard"
    )
    merge: Merge | None = option(
        None, help="full: between the blocks, too, which only ControlNets can; final; null for full where it can be"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.controls) < 2:
            raise UserError(f"maxfusion merges two controls or more, not {len(self.controls)}: take control for one")

    @property
    def rule(self) -> Rule:
        """Where controls are averaged and where one is taken."""
        return Rule(threshold=self.threshold, tau=self.tau)

    def at(self, level: float) -> float:
        return super().at(level) if any(one.acts([level]) for one in self.controls) else self.NEUTRAL

    def fed(self, network: Network, arguments: Mapping[str, Any], point: Point) -> Mapping[str, Any]:
        # What is outside of its window is left out, and no zeros that would be merged.
        acting = [
            (one, replace(point, memory=point.memory.setdefault(f"control {i}", {})))
            for i, one in enumerate(self.controls)
            if one.acts(point.levels)
        ]
        adapter, rows = _controls.is_adapter(self.controls[0].opened), len(arguments["sample"])
        # Rows of one level are not told apart: a call may see fewer of them than the point has.
        levels = point.levels if len({*point.levels}) > 1 else point.levels[:1]
        on = torch.tensor([[one.acts([level]) for level in levels] for one, _ in acting], device=point.x.device)
        on = on.repeat(1, rows // len(levels))
        if adapter or self.merge == "final":
            found = [one.features(network, arguments, at) for one, at in acting]
        else:
            shown = [one.shown(network, at) for one, at in acting]
            found = lockstep([one.opened for one, _ in acting], arguments, shown, self.rule, on)
        strong = [one.scaled(f, arguments, at) for f, (one, at) in zip(found, acting, strict=True)]
        merged = final(strong, self.rule, on)
        return _controls.given(arguments, _controls.scaled(merged, self.amount(point.levels, point.x), rows), adapter)

    def check(self, network: Network) -> None:
        for one in self.controls:
            one.check(network)
        nets = [one.opened for one in self.controls]
        kinds = {_controls.kind(net) for net in nets}
        if len(kinds) > 1:
            raise UserError(
                f"maxfusion merges nets of one kind, not {' and '.join(sorted(kinds))}: add one as a control by itself"
            )
        if _controls.is_adapter(nets[0]):
            if self.merge == "full":
                raise UserError("maxfusion: T2I-Adapters are merged at the end alone: set merge to final")
            if len({len(net.config.channels) for net in nets}) > 1:
                raise UserError("maxfusion: the T2I-Adapters have other levels than each other: leave one out")
        else:
            check_nets(nets, full=self.merge != "final")

    def begins(self, run: Run) -> None:
        for one in self.controls:
            one.begins(run)

    def note(self, network: Network, levels: Sequence[float]) -> str:
        levels = [level for level in levels if self.acts([level])]
        for i, one in enumerate(self.controls, start=1):
            if not one.acts(levels):
                raise UserError(f"maxfusion: control {i} acts at none of the steps: move its window, or leave it out")
        return "; ".join(f"maxfusion, {i}: {one.note(network, levels)}" for i, one in enumerate(self.controls, start=1))


def final(found: Sequence[Features], rule: Rule, on: Tensor) -> Features:
    """What the UNet is given, of the features of several nets; `on` [k, b]."""
    return tuple(rule.final(torch.stack(layer), on) for layer in zip(*found, strict=True))


class MaxFusionControlNet(MultiControlNetModel):
    """ControlNets merged, in the place of diffusers' wrapper that adds them up, for its ControlNet pipelines.

    Args:
        controlnets: of one base. threshold, tau, merge: as of the term.

    Raises:
        UserError: they cannot be merged; or, when it is called, guess mode and what else it does not know.
    """

    nets: torch.nn.ModuleList

    def __init__(
        self, controlnets: Sequence[ControlNetModel], *, threshold: float = 0.7, tau: float = 0.0, merge: Merge = "full"
    ) -> None:
        super().__init__(list(controlnets))
        check_nets(self.nets, full=merge == "full")
        self.rule, self.merge = Rule(threshold=threshold, tau=tau), merge

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        controlnet_cond: Sequence[Tensor],
        conditioning_scale: Sequence[float],
        added_cond_kwargs: Any = None,
        return_dict: bool = True,
        **more: Any,
    ) -> Any:
        """As of diffusers' wrapper. A scale of 0, which pipelines give outside of a window, leaves a net out."""
        asked = [name for name, value in more.items() if value is not None and value is not False]
        if asked:
            raise UserError(f"maxfusion does not know {asked[0]}: leave it out")
        arguments = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states,
                     "added_cond_kwargs": added_cond_kwargs}  # fmt: skip
        scales = [scale for scale in conditioning_scale if scale] or [0.0]
        kept = [i for i, scale in enumerate(conditioning_scale) if scale] or [0]
        nets, shown = [self.nets[i] for i in kept], [controlnet_cond[i] for i in kept]
        on = torch.ones(len(nets), len(sample), dtype=torch.bool, device=sample.device)
        if self.merge == "full":
            found = lockstep(nets, arguments, shown, self.rule, on)
        else:
            found = [_controls.features(net, arguments, s) for net, s in zip(nets, shown, strict=True)]
        strong = [_controls.scaled(f, scale, len(sample)) for f, scale in zip(found, scales, strict=True)]
        *down, middle = final(strong, self.rule, on)
        output: Any = ControlNetOutput
        return output(tuple(down), middle) if return_dict else (down, middle)


def build(config: Config) -> Config:
    """The term."""
    return config
