"""What a picture was made with, inside of its file, where other programs look for it.

`parameters` is the text that the web interface of AUTOMATIC1111 writes and many viewers read: a text chunk of PNG, the
`UserComment` of EXIF elsewhere. Everything is there as JSON besides, in the text chunk `visiontune` or the
`ImageDescription`. The keys of ComfyUI hold graphs of its nodes, which pictures of a pipeline do not have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from visiontune import files, outside
from visiontune.errors import UserError

KEY, PARAMETERS = "visiontune", "parameters"
# An EXIF block of a JPEG is one segment of the file, whose length has two bytes.
_LONGEST = 65_000
_SAMPLERS = {"ddim": "DDIM", "euler": "Euler", "dpm++": "DPM++ 2M", "unipc": "UniPC"}


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Of one picture the text for other programs, and everything as JSON has it."""

    parameters: str
    everything: dict[str, Any]

    @staticmethod
    def of(prompt: str, seed: int, settings: Mapping[str, Any], size: tuple[int, int]) -> Metadata:
        """Of a prompt and a seed, with the settings of a manifest; files and folders go by their names alone.

        Args:
            size: height and width in pixels.
        """
        shared = {**settings, "model": files.public_name(settings["model"])}
        shared["adapter"] = [{**one, "file": _name(one["file"])} for one in settings["adapter"]]
        words = [f"Steps: {settings['steps']}"]
        if settings["scheduler"] in _SAMPLERS:
            words.append(f"Sampler: {_SAMPLERS[settings['scheduler']]}")
        words += [f"CFG scale: {settings['cfg_scale']:g}", f"Seed: {seed}", f"Size: {size[1]}x{size[0]}"]
        words.append(f"Model: {_quoted(shared['model'])}")
        lines = [prompt, ", ".join(words)]
        if settings["negative_prompt"]:
            lines.insert(1, f"Negative prompt: {settings['negative_prompt']}")
        return Metadata(parameters="\n".join(lines), everything={"prompt": prompt, "seed": seed, "settings": shared})

    def options(self, format: str) -> dict[str, Any]:
        """How Pillow is told of it when it saves a picture in a format (`PNG`, `WEBP`, `JPEG`).

        A JPEG has room for 64 kB: what does not fit is left to the manifest, the JSON first.
        """
        if format == "PNG":
            chunks = PngImagePlugin.PngInfo()
            chunks.add_text(PARAMETERS, self.parameters)
            chunks.add_text(KEY, json.dumps(self.everything))
            return {"pnginfo": chunks}
        for everything in (True, False):
            block = self._exif(everything)
            if format != "JPEG" or len(block) <= _LONGEST:
                return {"exif": block}
        return {}

    def _exif(self, everything: bool) -> bytes:
        exif = Image.Exif()
        if everything:
            exif[ExifTags.Base.ImageDescription] = json.dumps(self.everything)
        comment = b"UNICODE\0" + self.parameters.encode("utf-16-be")
        exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
        return exif.tobytes()


def read(file: str | Path) -> dict[str, Any]:
    """Prompt, seed and settings of a picture that `visiontune sample` drew, in whichever format.

    Raises:
        UserError: it is no picture, or does not say what it was made with.
    """
    path = outside.regular(file, "picture")
    try:
        with Image.open(path) as picture:
            told = picture.info.get(KEY) or picture.getexif().get(ExifTags.Base.ImageDescription)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} is no picture: {' '.join(str(error).split())}") from error
    found = outside.parse_json(told, f"what {path} says of itself") if isinstance(told, str) else None
    if not isinstance(found, dict) or "settings" not in found:
        raise UserError(f"{path} does not say what it was made with: its manifest may")
    return found


def _name(file: str) -> str:
    path = Path(file)
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def _quoted(value: str) -> str:
    """A value as readers of `parameters` take it, where it has what parts or ends values."""
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:"\n') else value
