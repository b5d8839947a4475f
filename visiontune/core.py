"""The values that every part of visiontune passes to the next one: conditions, requests, batches, losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from PIL.Image import Image

Index = int | slice | Tensor
_Record = TypeVar("_Record", "Condition", "Batch")


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """What a model is told of `b` rows: what the text encoders gave for their prompts, and pictures that it is shown.

    Attributes:
        tokens: [b, n, d] token features.
        mask: [b, n] True where a token counts, or None where the family masks nothing.
        pooled: [b, d] one vector per prompt, or None where the family has none.
        extra: further tensors of the family (SDXL reads `time_ids` [b, 6]), the first axis being the batch. `channels`
            [b, k, h, w] stand beside those of the noisy latents, for models that paint into a picture; `scores` [b, k]
            are ratings in [0, 1], nan where one is not told, for denoisers that are told some.
        references: for each row the latents [c, h, w] of the pictures that it is shown, any number of any size; None
            where no row has any. Guidance away from a condition without references keeps those of the prompt.
    """

    tokens: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    references: list[tuple[Tensor, ...]] | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: Index) -> Condition:
        """The given rows; one integer keeps the batch axis (a Condition of length 1)."""
        return _select(self, rows)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """A copy on `device`, with the floating-point tensors in `dtype`; None leaves either as it is."""
        return _map(self, lambda value: _move(value, device, dtype))

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Join along the batch. Rows with fewer tokens are padded with zeros, which their `mask` leaves out.

        Raises ValueError where the parts do not carry the same fields.
        """
        return _cat(_shown(_padded(parts)))


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to draw.

    Attributes:
        prompt: what it is to show. negative: the prompt to guide away from.
        seed: of its noise.
        pictures: what a model that reads pictures is shown, of any size; the model fits them as its pipeline does.
        mask: of a model that paints into its picture: white where it paints, black where it keeps.
        noise: [c, (f), h, w] standard normal noise to start from, in the place of the seed's.
    """

    prompt: str
    seed: int = 0
    negative: str = ""
    pictures: tuple[Image, ...] = ()
    mask: Image | None = None
    noise: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One training batch of `b` rows.

    Attributes:
        prompts: the rows' captions.
        data: tensors with the batch as their first axis, by the name of the column that they come from. `image` are
            clean latents x_0 [b, c, (f), h, w], scaled as the denoiser expects them; batches to draw have `row` [b],
            each row's number among those of all processes, and `prompt` [b], the number of its prompt. Rows of sets
            have `set` [b], the same number for those of one, which stand beside one another.
        cond: the rows' conditions, or None where the objective embeds `prompts` itself.
        weight: [b] float32 weight of each row in the loss.
        prior: [b] bool, True for rows of prior preservation.
        ids: the rows' sample ids.
        timestep_range: [b, 2] float32, the noise that each row is trained at, as shares of the schedule in [0, 1]
            (`diffusion.levels`); None where all are trained at all.
        nouns: of each row the words whose places the bits of the column `segments` mark; None where there are none.
    """

    prompts: list[str]
    data: dict[str, Tensor]
    cond: Condition | None
    weight: Tensor
    prior: Tensor
    ids: list[str]
    timestep_range: Tensor | None = None
    nouns: list[tuple[str, ...]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Index) -> Batch:
        """The given rows; one integer keeps the batch axis (a Batch of length 1)."""
        return _select(self, rows)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """A copy on `device`; `dtype` is given to floating-point data and the condition, never to the weights."""
        moved = _map(self, lambda value: _move(value, device, None))
        return replace(moved, data=_move(moved.data, None, dtype), cond=_move(moved.cond, None, dtype))

    @staticmethod
    def cat(parts: Sequence[Batch]) -> Batch:
        """Join along the batch. Raises ValueError where the parts do not carry the same fields."""
        return _cat(parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """What an objective returns: `total`, the scalar to differentiate, and detached scalars for the logs."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Encoders(Protocol):
    """The part of a model of continuous latents (`models.diffusion.DiffusionModel`) that readers and caches rely on."""

    downsample: int
    unit: int
    resolution: int
    WORDS_SEE: ClassVar[bool]

    @property
    def paints(self) -> bool: ...
    def channels(self, hidden: Tensor, masks: Tensor) -> Tensor: ...
    def embed(self, prompts: Sequence[str]) -> Condition: ...
    def words(self, requests: Sequence[Request], negative: bool = False) -> Condition: ...
    def unconditional(self, count: int) -> Condition: ...
    def moments(self, pixels: Tensor) -> Tensor: ...
    def latents_from_moments(self, moments: Tensor, eps: Tensor | None = None) -> Tensor: ...
    def fingerprint(self, *parts: str) -> str: ...


def _padded(parts: Sequence[Condition]) -> list[Condition]:
    """The parts with as many tokens as the longest has, and with masks where any has one or tokens were added."""
    longest = max(part.tokens.shape[1] for part in parts)
    if all(part.mask is None and part.tokens.shape[1] == longest for part in parts):
        return list(parts)
    padded = []
    for part in parts:
        rows, length = part.tokens.shape[:2]
        mask = part.tokens.new_ones(rows, length, dtype=torch.bool) if part.mask is None else part.mask
        missing = longest - length
        padded.append(replace(part, tokens=pad(part.tokens, (0, 0, 0, missing)), mask=pad(mask, (0, missing))))
    return padded


def _shown(parts: Sequence[Condition]) -> Sequence[Condition]:
    """The parts with references in all where any has some."""
    if all(part.references is None for part in parts):
        return parts
    return [part if part.references is not None else replace(part, references=[()] * len(part)) for part in parts]


def _map(record: _Record, change: Any) -> _Record:
    return replace(record, **{f.name: change(getattr(record, f.name)) for f in fields(record)})


def _move(value: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, Condition):
        return value.to(device, dtype)
    if isinstance(value, dict):
        return {key: _move(item, device, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_move(item, device, dtype) for item in value)
    return value


def _select(record: _Record, rows: Index) -> _Record:
    if isinstance(rows, int):
        count = len(record)
        if not -count <= rows < count:
            raise IndexError(f"row {rows} of a batch of {count}")
        rows = slice(rows % count, rows % count + 1)
    return _map(record, lambda value: _rows(value, rows))


def _rows(value: Any, rows: slice | Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows if isinstance(rows, slice) else rows.to(value.device)]
    if isinstance(value, Condition):
        return value[rows]
    if isinstance(value, dict):
        return {key: _rows(item, rows) for key, item in value.items()}
    if isinstance(value, list):
        return value[rows] if isinstance(rows, slice) else [value[i] for i in torch.arange(len(value))[rows.cpu()]]
    return value


def _cat(parts: Sequence[_Record]) -> _Record:
    names = [f.name for f in fields(parts[0])]
    return replace(parts[0], **{name: _join(name, [getattr(part, name) for part in parts]) for name in names})


def _join(name: str, values: list[Any]) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise ValueError(f"cannot join batches of which only some have '{name}'")
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, Condition):
        return Condition.cat(values)
    if isinstance(first, list):
        return [item for value in values for item in value]
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise ValueError(f"cannot join batches with different keys in '{name}'")
        return {key: _join(f"{name}.{key}", [value[key] for value in values]) for key in first}
    return first
