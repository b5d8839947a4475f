"""Words with a meaning of their own, as files of textual inversion: what other tools call an embedding.

A file of one text encoder has one tensor, under the word, which diffusers, ComfyUI and A1111 read; of several it has
one for each, under the names that ComfyUI and A1111 know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from visiontune import files
from visiontune.errors import UserError
from visiontune.weights._factors import save_tensors

# As `Changes.words` gives them: word -> component -> rows.
Words = Mapping[str, Mapping[str, Tensor]]
_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def places(words: Words, path: Path) -> dict[str, Path]:
    """Word -> the file that it is written to, beside ``path``.

    Raises:
        UserError: something is there.
    """
    found = {}
    for word in words:
        name = re.sub(r"[^\w-]", "_", word)
        found[word] = path.with_name(f"{path.stem}-{name}.safetensors")
        files.check_new(found[word])
    return found


def check(words: Words) -> None:
    """Refuse words of encoders that no tool has a name for.

    Raises:
        UserError: naming the encoder.
    """
    for tensors in words.values():
        if len(tensors) > 1 and (strange := sorted(tensors.keys() - _ENCODERS.keys())):
            raise UserError(f"other tools have no name for words of '{strange[0]}': export as merged")


def write(words: Words, at: Mapping[str, Path], dtype: torch.dtype) -> list[str]:
    """Write each word, and say how it is used."""
    notes = []
    for word, own in words.items():
        tensors = {_ENCODERS.get(name, name) if len(own) > 1 else word: rows for name, rows in own.items()}
        save_tensors({key: rows.to(dtype) for key, rows in tensors.items()}, at[word], {"format": "pt"})
        use = f"load_textual_inversion('{at[word]}', token='{word}')" if len(own) == 1 else "each with its encoder"
        notes.append(
            f"'{word}' has a meaning of its own, in {at[word]}: a textual inversion for diffusers ({use}), ComfyUI "
            f"(embedding:{at[word].stem} in the place of {word}) and A1111"
        )
    return notes
