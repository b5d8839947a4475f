"""What the data modules share: the ``data:`` section of a recipe, one sample and its sources, and words in captions."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from visiontune.data import captions
from visiontune.data.mix import RANGE_HELP, WHOLE, Bounds, Part, check_tiles
from visiontune.data.scores import check_ranges
from visiontune.errors import UserError
from visiontune.outside import shown
from visiontune.schema import SLOTS, option

if TYPE_CHECKING:
    from PIL import Image

# Where the picture counts in the loss, and where a model paints into it.
MASKS = ("mask", "region")
# Where each noun of the caption is.
SEGMENTS = "segments"
_SLOT = re.compile(rf"\[({'|'.join(SLOTS)})\]", re.IGNORECASE)
DEFAULT_TRIGGER = "sks"
# Where the caption of a picture comes from that has none of its own.
DEFAULT_PROMPT = "data.prompt"
# What [class] stands for until the user says what the pictures show.
DEFAULT_CLASS = "object"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A further subject of a run; a bare value is ``root``."""

    SHORTHAND: ClassVar[str] = "root"

    root: str = option(help="its pictures, as data.root")
    trigger: str = option(DEFAULT_TRIGGER, help="its word, which must be no other's")
    class_noun: str | None = option(None, help="what [class] stands for in its captions; as data.class_noun")
    prompt: str | None = option(None, help="caption of its images without one; null: data.prompt")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The ``data:`` section of a recipe; a bare value is ``root``."""

    SHORTHAND: ClassVar[str] = "root"
    RENAMED: ClassVar[dict[str, str]] = {
        "image_column": "columns.image",
        "rejected_column": "columns.rejected",
    }

    root: str = option(
        help="folder of images, .parquet file, catalogue dataset (pocket/bumble), Hub dataset id; .txt of prompts"
    )
    prompt: str | None = option(None, help="caption of images without one: 'a photo of a [trigger] [class]'")
    trigger: str = option(DEFAULT_TRIGGER, help="word that [trigger] stands for")
    class_noun: str | None = option(None, help="what [class] stands for, such as dog; else the dataset's, else object")
    subjects: list[Subject] = option(
        [], help="further subjects that are learnt in the same run: [{root: my_cat, trigger: zwx, class_noun: cat}]"
    )
    mix: list[Part] = option(
        [], help="further sources that are learnt in the same run: [{root: my_style, timestep_range: [0, 0.9]}]"
    )
    timestep_range: Bounds = option(WHOLE, least=0, greatest=1, help=f"with mix: {RANGE_HELP}")
    weight: float = option(
        1.0, above=0, greatest=1e6, help="with mix: how often rows of root come beside those of the others"
    )
    resolution: int | None = option(
        None, least=8, greatest=16384, help="side of the square whose area every image is resized to (model's own)"
    )
    buckets: bool = option(True, help="keep aspect ratios up to 2:1 by grouping images; false crops all to squares")
    crop: Literal["center", "random"] = option("center", help="where to crop; random needs cache: false")
    flip: bool = option(False, help="mirror each row with probability one half, unless its caption says left or right")
    columns: dict[str, str] = option(
        {},
        help="what image, mask, rejected ... are called in a table, in metadata.jsonl or as subfolders, if not so",
    )
    caption_column: str = option(
        captions.DEFAULT_KEY, help="column of the captions, also in metadata.jsonl, metadata.csv and .json files"
    )
    weight_column: str | None = option(
        None, help="column or key of numbers above 0, by which the loss of each picture is multiplied; null: 1"
    )
    scores: dict[str, tuple[float, float]] = option(
        {},
        least=-1e9,
        greatest=1e9,
        help="columns or keys with ratings of the pictures, each with its worst and its best value: {quality: [0, 5], "
        "watermark: [1, 0]}. The denoiser is told them, and draws the best unless asked for others",
    )
    score_dropout: float = option(
        0.1, least=0, greatest=1, help="with scores: share of them in [0, 1] that rows are not told"
    )
    ignore: list[str] | str = option(
        [], help="files, folders, keys and columns to leave out, by name or pattern; all: whatever nothing reads"
    )
    frame_pairs: bool = option(
        False, help="of pictures with several frames (GIF, WebP, APNG) learn the last, with the first as its source"
    )
    canvas: bool = option(
        False,
        help="of models that paint: show each row's source on the left of one wide picture, and have its image painted "
        "on the right",
    )
    box: bool = option(
        False, help="paint into the least box that holds each region, so that no outline tells what was there"
    )
    box_jitter: float = option(
        0.0, least=0, greatest=1, help="of box: how far each side moves outwards at a visit, at most, in sides of it"
    )
    zoom: float = option(
        0.0,
        least=0,
        below=1,
        help="share by which each visit's picture is made smaller or larger, at most; where nothing is left of it does "
        "not count. Needs cache: false",
    )
    set_size: int = option(
        1,
        least=1,
        greatest=64,
        help="pictures of a set that stand beside one another in a batch: as many of each subfolder of root, or of the "
        "rows of a table with the same `set`; train.batch_size is a multiple of it",
    )
    split: str = option("train", help="split of a Hub dataset")
    revision: str | None = option(None, help="commit or tag of a Hub dataset")
    cache: bool = option(True, help="keep latents on disk instead of encoding images again at every step")
    caption_dropout: float = option(
        0.0, least=0, greatest=1, help="share of rows in [0, 1] trained on the empty caption"
    )
    source_dropout: float = option(
        0.0,
        least=0,
        greatest=1,
        help="share of rows in [0, 1] that are not shown their source; with a caption_dropout as large, half of them "
        "have no caption either",
    )

    def __post_init__(self) -> None:
        if self.crop == "random" and self.cache:
            raise UserError("data.crop=random draws a new crop at every step: set data.cache=false with it")
        if self.zoom and self.cache:
            raise UserError("data.zoom makes another picture at every step: set data.cache=false with it")
        if self.box_jitter and not self.box:
            raise UserError("data.box_jitter moves the sides of a box: set data.box=true with it, or leave it out")
        moving = {"flip": self.flip, "crop=random": self.crop == "random", "zoom": self.zoom, "box": self.box}
        if self.canvas and any(moving.values()):
            found = next(name for name, given in moving.items() if given)
            raise UserError(f"data.canvas has panels in fixed places, which data.{found} would move: leave it out")
        if self.caption_dropout / 2 + self.source_dropout > 1:
            raise UserError(
                "data.source_dropout and half of data.caption_dropout are more than the whole: lower one of them"
            )
        if self.mix and self.subjects:
            raise ValueError("mix and subjects both name further pictures: take one of them")
        if self.weight != 1 and not self.mix:
            raise ValueError("weight is beside that of data.mix, which is empty: leave it out")
        if self.set_size > 1 and (self.mix or self.subjects):
            raise ValueError("set_size is for sets of one root, and mix and subjects name further ones: leave them out")
        check_tiles(self.ranges())
        check_ranges(self.scores)

    def each(self) -> list[Config]:
        """The data of every subject by itself, the first that of ``root``."""
        own = replace(self, subjects=[])
        given = [{**vars(one), "prompt": one.prompt or self.prompt} for one in self.subjects]
        return [own, *(replace(own, **options) for options in given)]

    def parts(self) -> list[Config]:
        """The data of every source by itself, the first that of ``root``."""
        own = replace(self, mix=[], timestep_range=WHOLE, weight=1.0)
        return [own, *(replace(own, root=one.root, prompt=one.prompt or self.prompt) for one in self.mix)]

    def ranges(self) -> list[Bounds]:
        """The range of noise of every source, in the order of :meth:`parts`."""
        return [self.timestep_range, *(one.timestep_range for one in self.mix)]

    def weights(self) -> list[float]:
        """How often every source comes, in the order of :meth:`parts`."""
        return [self.weight, *(one.weight for one in self.mix)]

    def key(self, column: str) -> str:
        """What a column is called in the user's data."""
        return self.columns.get(column, column)

    def ignores(self, name: str) -> bool:
        """Whether a file or folder (its path from ``root``), a key or a column is left out by name or pattern."""
        patterns = [self.ignore] if isinstance(self.ignore, str) else self.ignore
        parts = name.split("/")
        names = {parts[-1], *("/".join(parts[:n]) for n in range(1, len(parts) + 1))}
        return any(fnmatchcase(name, pattern.rstrip("/")) for name in names for pattern in patterns)

    @property
    def ignores_all(self) -> bool:
        """Whether everything that nothing reads is left out."""
        return self.ignore == "all" or "all" in self.ignore


@dataclass(frozen=True)
class Source:
    """Where one column of a sample comes from.

    Attributes:
        origin: a file, or a function that returns the picture.
        kind: what it is: a ``picture``, a ``mask``, white where something counts, or ``segments``, masks of several
            nouns in one (:mod:`visiontune.data.segments`).
    """

    origin: Path | Callable[[], Image.Image]
    kind: Literal["picture", "mask", "segments"] = "picture"

    @property
    def file(self) -> Path | None:
        """The file, or ``None`` where there is none."""
        return self.origin if isinstance(self.origin, Path) else None

    def open(self) -> Image.Image:
        """The whole picture, decoded and upright, in RGB, a mask in eight-bit grey, or segments as they are.

        Raises:
            UserError: the file is missing, truncated or no picture. A function may raise anything.
        """
        from visiontune.data import pictures

        if isinstance(self.origin, Path):
            return (pictures.read_mask if self.kind == "mask" else pictures.read)(self.origin)
        if self.kind == "segments":
            return self.origin()
        return (pictures.mask if self.kind == "mask" else pictures.upright_rgb)(self.origin())

    def size(self) -> tuple[int, int]:
        """Height and width of the upright picture; of a file only the header is read. Errors as in :meth:`open`."""
        from visiontune.data import pictures

        if isinstance(self.origin, Path):
            return pictures.size(self.origin)
        picture = self.open()
        return picture.height, picture.width

    def digest(self) -> str:
        """SHA-256 of the content: the file's bytes, or the pixels of a picture without a file."""
        if isinstance(self.origin, Path):
            return hashlib.sha256(self.origin.read_bytes()).hexdigest()
        picture = self.open()
        return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What belongs to one caption.

    Attributes:
        id: what messages and batches call it (the file name, for instance).
        sources: pictures by the name of their column. ``image`` is what a model learns to draw; a pair has the worse
            picture as ``rejected``, an edit what it was made of as ``source``; ``mask`` says where the picture counts,
            ``region`` where it is painted. The first is the main one, whose shape decides the bucket.
        caption: its words, nothing left to substitute. caption_from: where they stood: a kind of file, a table.
        prior: whether it is a prior-preservation image (DreamBooth) rather than one of the user's own.
        weight: factor of its loss; prior samples carry the prior weight lambda.
        part: which of several sources it is of (:meth:`Config.parts`).
        scores: its ratings in [0, 1], in the order of ``data.scores``, nan where it has none; of prior samples none.
        nouns: the words of the caption whose places the bits of ``segments`` mark, the first that of bit 0.
        set: which set of pictures it is of; empty where it is of none.
    """

    id: str
    sources: dict[str, Source]
    caption: str
    prior: bool = False
    weight: float = 1.0
    caption_from: str = DEFAULT_PROMPT
    part: int = 0
    scores: tuple[float, ...] = ()
    nouns: tuple[str, ...] = ()
    set: str = ""


def source(column: str, origin: Path | Callable[[], Image.Image]) -> Source:
    """The source of a column: of a mask for those of ``MASKS``, of a picture for any other name."""
    return Source(origin, "mask" if column in MASKS else "picture")


def substitute(
    text: str, trigger: str | None, class_noun: str | None = None, *, mend: str = "set data.class_noun"
) -> str:
    """Put the trigger word and the class noun in the place of ``[trigger]`` and ``[class]``, in either case.

    Raises:
        UserError: the text has one of them and there is no word for it; the message ends with ``mend``.
    """
    words = {"trigger": trigger, "class": class_noun}

    def word(slot: re.Match[str]) -> str:
        found = words[slot[1].lower()]
        if found is None:
            raise UserError(f"'{shown(text)}' has {slot[0]}, and no word is known for it: {mend}")
        return found

    return _SLOT.sub(word, text)


def weight_of(told: object, where: str) -> float:
    """How much a picture counts, as a table has it.

    Raises:
        UserError: it is no number above 0.
    """
    try:
        found = math.nan if isinstance(told, bool) else float(told)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if not 0 < found < math.inf:
        raise UserError(
            f"{where}: the weight of a picture is a number above 0, not {shown(str(told))[:40]} (data.weight_column): "
            "write one, or leave the picture out"
        )
    return found


def has_slots(text: str) -> bool:
    """Whether :func:`substitute` would replace something."""
    return _SLOT.search(text) is not None


def listed(names: list[str], limit: int = 10) -> str:
    """Names for one line of a message: the first ten, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def default_from(place: str) -> str:
    """``Sample.caption_from`` of a picture without a caption; ``place`` should have had it, or is empty."""
    return f"{DEFAULT_PROMPT}, since {place} has none" if place else DEFAULT_PROMPT


def words_of(caption: str | None, config: Config) -> str:
    """A caption in the config's words, on one line; ``None`` means that there is none, and gives ``config.prompt``."""
    text = (config.prompt or "") if caption is None else caption
    return substitute(captions.words(text), config.trigger, config.class_noun)
