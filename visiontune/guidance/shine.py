"""SHINE: a subject that the adapters know, in a box of a picture.

Lian et al., 2025, arXiv 2509.21278. The picture, with something rough in the box, is noised once, to the level at which
the run starts. In the first steps the latents in the box go to what the adapted model makes of them and the base does
not,

    z <- z - eta M_box (v(z; adapted, prompt) - v(z_start; base, source)),    m times, the base's prediction frozen,

of flow and v; a difference of other predictions is turned into that of v which changes the clean picture as much. Where
a step starts, everything outside of a mask is the picture at that level: at first the mask is the object where the
attention to its words finds it, later the box. The paper's third part, guidance away from blurred queries, is the term
`seg` beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontune.adapters import attached
from visiontune.core import Condition
from visiontune.diffusion.guidance import guided
from visiontune.errors import UserError
from visiontune.guidance._beneath import towards, without_adapters
from visiontune.guidance._network import Network
from visiontune.guidance._objects import drawn
from visiontune.guidance._pictures import check_mask, check_picture, fitted, latents_of, mask_of
from visiontune.guidance._probe import of_places, probing, together
from visiontune.guidance.base import Edit, Point, Run, Shaping, Strength, place
from visiontune.models.words import places
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Edit, Shaping):
    """A subject in a box of a picture."""

    STARTS = True

    scale: float = option(
        1.0, least=0, greatest=1, help="how much of what is outside of the masks is the picture's; 0 is a free drawing"
    )
    picture: Any = option(help="file of the picture, with something like the subject in the box; in the drawn ratio")
    mask: Any = option(
        help="where the subject goes: file of a mask, white there; or left, top, width and height in pixels"
    )
    subject: str = option(help="the words of the prompt that name the subject, whose attention says where it is")
    prompt: str | None = option(None, help="what the adapted model draws in the box; null for the picture's own prompt")
    source: str | None = option(None, help="what the base is told of the picture; null for the same prompt")
    start: float = option(0.8, above=0, greatest=1, help="level of noise at which the run starts from the picture")
    pull: list[float] = option(
        [0.1, 0.1], least=0, greatest=10, help="eta of the first steps, one a step; none for no pull"
    )
    iterations: int = option(2, least=1, greatest=1000, help="m, how often a step pulls, each in a call of the network")
    cfg_scale: float = option(3.5, least=-1000, greatest=1000, help="of the predictions whose difference pulls")
    threshold: float = option(
        0.4, least=0, below=1, help="share of the range of the attention above which there is the object"
    )
    dilation: int = option(3, least=1, greatest=99, help="side of the square by which the object is dilated, in tokens")
    beyond: bool = option(
        False, help="later masks hold the object's bounding box, too, so that its shadow may leave the user's box"
    )
    layers: str | list[str] = option(
        "mid", help="mid, all, numbers of blocks, or patterns of the names of layers that attend to words"
    )

    def edit(self, x: Tensor, s: Strength, point: Point) -> Tensor:
        assert point.schedule is not None
        noise = point.memory.setdefault("noise", x)
        clean = latents_of(self.picture, point, self.name).expand_as(x)
        known = point.schedule.add_noise(clean, noise, point.t).to(x)
        if point.levels[0] > self.start:
            return known
        step = point.memory["step"] = point.memory.get("step", -1) + 1
        if step == 0:
            x = known
        else:
            outside = s * (1 - self._mask(step - 1, point))
            x = x.where(outside == 0, known.where(outside == 1, x + outside * (known - x)))
        return self._pulled(x, step, point)

    def overwrites(self, start: float) -> bool:
        return start > self.start

    def shaping(
        self, network: Network, arguments: Mapping[str, Any], point: Point, side: str
    ) -> AbstractContextManager[Any]:
        # Of two calls of a step the first is the prompt's.
        late = point.memory.get("step", 0) > len(self.pull) and not self.beyond
        if late or side not in ("both", "prompt") or point.memory.get("looked") == point.levels[0]:
            return nullcontext()
        if tuple(point.x.shape[1:]) != tuple(point.run.shape):
            raise UserError(f"{self.name} draws in whole pictures: leave out terms that draw in regions")
        memory, rows = point.memory, len(point.x)
        prompts = self._prompts(point.run, rows)
        maps = memory["maps"] = dict[str, Tensor]()

        def tell(name: str, found: Tensor) -> None:
            # Of two sides in one call the prompt's is the second.
            maps[name] = of_places(found[-rows:], [places(point.run.model, one, self.subject) for one in prompts])
            memory["looked"] = point.levels[0]

        return probing(network, network.worded(self.layers, self.name), arguments, self.name, tell)

    def check(self, network: Network) -> None:
        check_picture(self.picture, self.name)
        check_mask(self.mask, self.name)
        network.worded(self.layers, self.name)

    def begins(self, run: Run) -> None:
        model = run.modelled(self.name)
        if len(run.shape) > 3:
            raise UserError(f"shine edits a picture, and '{model.source}' draws clips: take a model of pictures")
        if run.prompts is None and self.prompt is None:
            raise UserError(
                "shine: the prompts of the pictures are not known here: set its prompt, or give them to attach"
            )
        for prompt in self._prompts(run, 1):
            places(model, prompt, self.subject)
        if run.shape:
            fitted(self.picture, model.downsample, run.shape, self.name)
            canvas = torch.zeros(1, *run.shape)
            mask_of(self.mask, Point(x=canvas, t=canvas[:, 0, 0, 0], levels=[0.0], schedule=None, run=run), self.name)
        if run.levels and not (self.acts(run.levels[:1]) and self._steps(run)):
            raise UserError(
                f"shine begins a run, whose steps stand at levels of noise from {max(run.levels):.3g} to "
                f"{min(run.levels):.3g}: move the upper end of its window, or its start, there"
            )
        acting = any(one.enabled for one in attached(model.networks()).values())
        if any(self.pull) and not acting and self.source in (None, self.prompt):
            raise UserError(
                f"shine pulls to what adapters add to '{model.source}', which has none: attach them, give a source, or "
                "set its pull to []"
            )

    def rows_at(self, level: float, run: Run) -> int:
        step = place(self._steps(run), level)
        if step is None or not self._eta(step, run):
            return 0
        sides = 2 if run.model.guidance(self.cfg_scale).contrasts else 1
        return sides * (1 + self.iterations)

    def _steps(self, run: Run) -> Sequence[float]:
        """The levels at which steps stand that are computed."""
        return [level for level in run.levels if level <= self.start]

    def _eta(self, step: int, run: Run) -> float:
        """Of a step; what comes after the last one is the end."""
        return self.pull[step] if step < min(len(self.pull), len(self._steps(run))) else 0.0

    def _prompts(self, run: Run, rows: int) -> Sequence[str]:
        return list(run.prompts or ()) if self.prompt is None else [self.prompt] * rows

    def _mask(self, step: int, point: Point) -> Tensor:
        """[b or 1, 1, h, w], 1 where what a step has led to stays."""
        box, early = mask_of(self.mask, point, self.name), step <= len(self.pull)
        if not (early or self.beyond):
            return box
        maps = together([*point.memory["maps"].values()])
        return drawn(maps, box, threshold=self.threshold, dilation=self.dilation, tight=early)

    @torch.no_grad()
    def _pulled(self, x: Tensor, step: int, point: Point) -> Tensor:
        """The latents [b, ...] after the pulls of a step."""
        eta = self._eta(step, point.run)
        if not eta:
            return x
        told = self._told(point, len(x))
        # Small steps would be lost in low precision.
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        with without_adapters(point.run.model):
            anchor = self._predicted(z, point, told[1])
        for _ in range(self.iterations):
            z = z + eta * mask_of(self.mask, point, self.name) * towards(
                self._predicted(z, point, told[0]) - anchor, point
            )
        return z.to(x.dtype)

    def _predicted(self, z: Tensor, point: Point, cond: Condition) -> Tensor:
        model = point.run.model
        return guided(model, z, point.t, cond, None, model.guidance(self.cfg_scale))

    def _told(self, point: Point, rows: int) -> tuple[Condition, Condition]:
        """What the adapted model is told, and what the base is."""
        if "told" not in point.memory:
            model, prompts = point.run.model, self._prompts(point.run, rows)
            with without_adapters(model):
                source = model.embed([*prompts] if self.source is None else [self.source] * rows)
            point.memory["told"] = model.embed([*prompts]), source
        found: tuple[Condition, Condition] = point.memory["told"]
        return found


def build(config: Config) -> Config:
    """The term."""
    return config
