"""The network that is guided, and how layers of it are chosen."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from visiontune.diffusion.schedule import Schedule
from visiontune.errors import UserError
from visiontune.models import families
from visiontune.models._structure import Structure
from visiontune.schema import nearest

Layers = str | Sequence[int | str]
_NUMBER = re.compile(r"\d+")
# Of each denoiser the modules of a pattern, which are the same at every step.
_found: WeakKeyDictionary[nn.Module, dict[str, dict[str, nn.Module]]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """What terms know of a model.

    Attributes:
        source: what the user calls it. denoisers: the networks that predict, by the names of their components.
        structure: what they are made of; None where that was not verified.
        schedule: None where it predicts masked tokens.
    """

    source: str
    denoisers: Mapping[str, nn.Module]
    structure: Structure | None
    schedule: Schedule | None

    @staticmethod
    def of_model(model: Any) -> Network:
        """Of a family's model."""
        names = getattr(model, "DENOISERS", ())
        return Network(
            source=getattr(model, "source", type(model).__name__),
            denoisers={name: getattr(model.pipe, name) for name in names},
            structure=_of_pipeline(type(model), model.pipe) if names else None,
            schedule=getattr(model, "schedule", None),
        )

    @staticmethod
    def of_pipeline(pipe: Any) -> Network:
        """Of a stock pipeline.

        Raises:
            UserError: no family that can be guided so has its class.
        """
        name = type(pipe).__name__
        kinds: list[Any] = [kind for kind in families(name).values() if name in getattr(kind, "pipeline_classes", ())]
        structure = _of_pipeline(kinds[0], pipe) if kinds else None
        if structure is None:
            able = {one for kind in families().values() for one in _able(kind)}
            raise UserError(f"guidance cannot be attached to a {name}: it can to {', '.join(sorted(able))}")
        return Network(
            source=str(pipe.config.get("_name_or_path") or name),
            denoisers={part: getattr(pipe, part) for part in kinds[0].DENOISERS},
            structure=structure,
            schedule=None if structure.time is None else Schedule.from_scheduler(pipe.scheduler),
        )

    @property
    def denoiser(self) -> nn.Module:
        """The network that predicts; families that are reached into have one."""
        return next(iter(self.denoisers.values()))

    def attention(self, layers: Layers, term: str) -> dict[str, nn.Module]:
        """Layers in which the picture attends to itself: `mid`, `all`, or patterns of names.

        Raises:
            UserError: the network has none that are known, or a pattern matches none of them.
        """
        known = self._reached(term).attention
        if not known:
            raise UserError(
                f"{term} changes how a picture attends to itself, for which '{self.source}' has no layers: "
                "take slg or autoguidance"
            )
        return self._chosen(layers, self._all(known), term)

    def worded(self, layers: Layers, term: str) -> dict[str, nn.Module]:
        """Layers in which the picture attends to words, chosen as in `attention`.

        Raises:
            UserError: the network has none that are known, or a pattern matches none of them.
        """
        structure = self._reached(term)
        known = (
            [structure.cross] if structure.cross else [one for one, at in structure.attention.items() if at != "none"]
        )
        if not known:
            raise UserError(
                f"{term} looks where words are attended to, for which '{self.source}' has no layers of its own: "
                f"leave {term} out"
            )
        return self._chosen(layers, self._all(known), term)

    def reading(self, term: str) -> dict[str, nn.Module]:
        """The layers in which the picture attends to the words alone.

        Raises:
            UserError: the network has none that are known.
        """
        structure = self._reached(term)
        # Transformers change words before their layers read them.
        known = None if structure.stages is None else structure.cross
        if known is None:
            raise UserError(
                f"{term} changes what a picture reads of its words, for which '{self.source}' has no layers of their "
                f"own, as the UNets of sd and sdxl have: leave {term} out"
            )
        return self._all([known])

    def attending(self, layers: Layers, term: str) -> dict[str, nn.Module]:
        """Layers in which the picture attends to itself or to the words, chosen as in `attention`.

        Raises:
            UserError: as of `reading`.
        """
        reading = self.reading(term)
        return self._chosen(layers, self.attention("all", term) | reading, term)

    def words(self, layer: str, arguments: Mapping[str, Any]) -> slice:
        """Which tokens of an attention layer are words, `slice(0, 0)` where none are.

        Args:
            arguments: of the denoiser's call.
        """
        structure = self._reached("attention")
        place = next(place for pattern, place in structure.attention.items() if re.fullmatch(pattern, layer))
        count = 0 if place == "none" else arguments[structure.words].shape[1]
        return slice(0, count) if place != "after" else slice(-count, None)

    def grid(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the picture that the denoiser is called with, in the ratio of its tokens."""
        structure = self._reached("attention")
        return structure.grid(arguments, structure.noisy)

    def returned(self, block: str) -> tuple[str, ...]:
        """The arguments of a block that it returns, in order."""
        patterns = self._reached("blocks").blocks
        return next(names for pattern, names in patterns.items() if re.fullmatch(pattern, block))

    def blocks(self, layers: Layers, term: str) -> dict[str, nn.Module]:
        """Whole blocks, chosen as in `attention`."""
        return self._chosen(layers, self._all(self._reached(term).blocks), term)

    def stages(self, term: str) -> tuple[dict[str, nn.Module], dict[str, nn.Module], dict[str, nn.Module]]:
        """What goes down, the middle, and what comes up and takes long skips, each in the order of evaluation.

        Raises:
            UserError: the network has no long skips.
        """
        stages = self._reached(term).stages
        if stages is None:
            raise UserError(
                f"{term} is for UNets, which hand features across from the way down to the way up, and "
                f"'{self.source}' has no such skips: leave {term} out"
            )
        down, middle, up = (self._all([pattern]) for pattern in stages)
        return down, middle, up

    def inside(self, layers: Layers, term: str) -> dict[str, nn.Module]:
        """Stages and what is in them, chosen as in `attention`; of what stands within another choice, that alone."""
        begun = tuple(f"{name}." for stage in self.stages(term) for name in stage)
        candidates = {n: m for n, m in self.denoiser.named_modules() if f"{n}.".startswith(begun)}
        chosen = self._chosen(layers, candidates, term)
        return {n: m for n, m in chosen.items() if not any(n.startswith(f"{other}.") for other in chosen)}

    def _reached(self, term: str) -> Structure:
        if self.structure is None:
            raise UserError(f"{term} reaches into the network, and that of '{self.source}' is not known: take cfg, apg")
        return self.structure

    def _all(self, patterns: Iterable[str]) -> dict[str, nn.Module]:
        cache = _found.setdefault(self.denoiser, {})
        key = "|".join(f"({pattern})" for pattern in patterns)
        if key not in cache:
            cache[key] = {n: m for n, m in self.denoiser.named_modules() if re.fullmatch(key, n)}
        return cache[key]

    def _chosen(self, layers: Layers, candidates: Mapping[str, nn.Module], term: str) -> dict[str, nn.Module]:
        chosen: dict[str, nn.Module] = {}
        for pattern in [layers] if isinstance(layers, str) else map(str, layers):
            hits = {name: module for name, module in candidates.items() if self._matches(pattern, name)}
            if not hits:
                raise UserError(
                    f"{term}: no layer of '{self.source}' is called '{pattern}'{_like(pattern, candidates)}"
                )
            chosen |= hits
        return {name: candidates[name] for name in candidates if name in chosen}

    def _matches(self, pattern: str, name: str) -> bool:
        if pattern == "all":
            return True
        if pattern == "mid":
            pattern = self._middle()
        elif _NUMBER.fullmatch(pattern):
            blocks = list(self._all(self._reached("layers").blocks))
            if int(pattern) >= len(blocks):
                return False
            pattern = blocks[int(pattern)]
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")

    def _middle(self) -> str:
        structure = self._reached("mid")
        if structure.mid is not None:
            return structure.mid
        blocks = list(self._all(structure.blocks))
        return blocks[len(blocks) // 2]


def _like(pattern: str, names: Iterable[str]) -> str:
    """The end of a message about a pattern without a match: what is called nearly so, or an example."""
    parts = [name.split(".") for name in names]
    begun = {"mid", "all"} | {".".join(part[:n]) for part in parts for n in range(1, len(part) + 1)}
    close = nearest(pattern, begun)
    return close if close.startswith("; did") else f": take mid, all, or a pattern such as '{'.'.join(parts[0])}'"


def _of_pipeline(kind: Any, pipe: Any) -> Structure | None:
    return kind.STRUCTURE if type(pipe).__name__ in _able(kind) else None


def _able(kind: Any) -> tuple[str, ...]:
    """The pipeline classes of a family that can be guided from outside."""
    structure = getattr(kind, "STRUCTURE", None)
    if structure is None:
        return ()
    return structure.pipelines or kind.pipeline_classes
