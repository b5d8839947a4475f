"""What the data modules share: the ``data:`` section of a recipe, one sample, and the words put into captions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from visiontune.errors import UserError
from visiontune.schema import option

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_TRIGGER = "sks"
# What [class] stands for until the user says what the pictures show.
DEFAULT_CLASS = "object"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The ``data:`` section of a recipe; a bare value is ``root``."""

    SHORTHAND: ClassVar[str] = "root"

    root: str = option(
        help="folder of images, .parquet file, catalogue dataset (pocket/bumble), Hub dataset id; .txt of prompts"
    )
    prompt: str | None = option(None, help="caption of images without one: 'a photo of a [trigger] [class]'")
    trigger: str = option(DEFAULT_TRIGGER, help="word that [trigger] stands for")
    class_noun: str | None = option(None, help="what [class] stands for, such as dog; else the dataset's, else object")
    resolution: int | None = option(None, help="side of the square whose area every image is resized to (model's own)")
    buckets: bool = option(True, help="keep aspect ratios up to 2:1 by grouping images; false crops all to squares")
    crop: Literal["center", "random"] = option("center", help="where to crop; random needs cache: false")
    flip: bool = option(False, help="mirror each row left to right with probability one half")
    image_column: str = option("image", help="column of the images in a parquet or Hub dataset")
    caption_column: str = option("text", help="column of the captions, also in metadata.jsonl")
    rejected_column: str = option("rejected", help="column of the worse images of pairs, also in metadata.jsonl")
    split: str = option("train", help="split of a Hub dataset")
    revision: str | None = option(None, help="commit or tag of a Hub dataset")
    cache: bool = option(True, help="keep latents on disk instead of encoding images again at every step")
    caption_dropout: float = option(0.0, help="share of rows in [0, 1] trained on the empty caption")

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"data.caption_dropout must be between 0 and 1, not {self.caption_dropout}")
        if self.crop == "random" and self.cache:
            raise UserError("data.crop=random draws a new crop at every step: set data.cache=false with it")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One captioned image.

    Attributes:
        id: what messages and batches call it (the file name, for instance).
        image: a file, or a function that returns the picture.
        caption: its words, nothing left to substitute.
        prior: whether it is a prior-preservation image (DreamBooth) rather than one of the user's own.
        weight: factor of its loss; prior samples carry the prior weight lambda.
        rejected: the worse image of a pair of one caption, of which ``image`` is the better one.
    """

    id: str
    image: Path | Callable[[], Image.Image]
    caption: str
    prior: bool = False
    weight: float = 1.0
    rejected: Path | Callable[[], Image.Image] | None = None

    def partner(self) -> Sample | None:
        """The worse image of the pair as a sample, or ``None`` where there is no pair."""
        if self.rejected is None:
            return None
        return replace(self, id=f"{self.id} (rejected)", image=self.rejected, rejected=None)

    def open(self) -> Image.Image:
        """The whole picture, decoded, upright and RGB.

        Raises:
            OSError: the file is missing, truncated or no image; decoders may raise other errors too.
        """
        from PIL import Image

        from visiontune.data.transforms import upright_rgb

        if not isinstance(self.image, Path):
            return upright_rgb(self.image())
        with Image.open(self.image) as picture:
            return upright_rgb(picture)

    def size(self) -> tuple[int, int]:
        """Height and width of the upright picture; of a file only the header is read. Errors as in :meth:`open`."""
        from PIL import ExifTags, Image

        if not isinstance(self.image, Path):
            picture = self.open()
            return picture.height, picture.width
        with Image.open(self.image) as picture:
            on_its_side = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (picture.width, picture.height) if on_its_side else (picture.height, picture.width)

    def digest(self) -> str:
        """SHA-256 of the image's content: the file's bytes, or the pixels of a picture without a file."""
        if isinstance(self.image, Path):
            return hashlib.sha256(self.image.read_bytes()).hexdigest()
        picture = self.open()
        return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def substitute(text: str, trigger: str, class_noun: str | None = None) -> str:
    """Put the trigger word and the class noun in the place of ``[trigger]`` and ``[class]``.

    Raises:
        UserError: the text has ``[class]`` and there is no class noun.
    """
    if class_noun is None and re.search(r"\[class\]", text, re.IGNORECASE):
        raise UserError(f"'{text}' has [class] but no class noun is known: set data.class_noun")
    words = {"trigger": trigger, "class": class_noun or ""}
    return re.sub(r"\[(trigger|class)\]", lambda m: words[m[1].lower()], text, flags=re.IGNORECASE)


def listed(names: list[str], limit: int = 10) -> str:
    """Names for one line of a message: the first ten, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def captioned(name: str, image: Path | Callable[[], Image.Image], caption: str | None, config: Config) -> Sample:
    """A sample in the config's words; ``None`` as its caption means that it has none of its own."""
    words = (config.prompt or "") if caption is None else caption
    return Sample(id=name, image=image, caption=substitute(" ".join(words.split()), config.trigger, config.class_noun))


def caption_text(value: Any, where: str) -> str | None:
    """A caption as it stands in a table, text or nothing. Raises UserError for anything else."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"the caption in {where} is {type(value).__name__}, not text: name another data.caption_column")
    return value
