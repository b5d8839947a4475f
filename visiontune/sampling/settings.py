"""What of a sampling run decides how its pictures look, as the manifest keeps it."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune import outside
from visiontune.sampling.config import AdapterConfig, SampleConfig
from visiontune.sampling.shown import digests
from visiontune.sampling.sources import adapter_file, base_of
from visiontune.search.asked import settings as search

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

_LOW = "model of few bits"


def settings_of(config: SampleConfig, model: PipelineModel | None) -> dict[str, Any]:
    """What a folder holds one of: batch size, device and processes are not among it."""
    source = model.source if model else base_of(config)
    return {
        "model": source,
        "model_files": None if model else _stamp(Path(source).expanduser()),
        "revision": config.revision,
        **({"variant": config.variant} if config.variant else {}),
        "dtype": config.dtype,
        **({"low_bits": _of_file(outside.regular(config.low_bits, _LOW))} if config.low_bits else {}),
        "adapter": [_adapter(one) for one in config.adapter_list()],
        "adapter_scale": config.adapter_scale,
        "steps": config.steps,
        "cfg_scale": config.cfg_scale,
        **({"guidance": config.guidance} if config.guidance else {}),
        **({"search": search(config.search)} if config.search else {}),
        **({"held_out": config.held_out} if config.held_out else {}),
        **({"image_cfg_scale": config.image_cfg_scale} if config.image_cfg_scale is not None else {}),
        **({"pictures": digests(config.picture_list())} if config.pictures else {}),
        **({"mask": digests([config.mask])} if config.mask else {}),
        **({"paste": True} if config.paste else {}),
        **({"canvas": True} if config.canvas else {}),
        **({"scores": config.scores} if config.scores else {}),
        "negative_prompt": config.negative_prompt,
        "scheduler": config.scheduler,
        "height": config.height,
        "width": config.width,
        "format": config.format,
        **({"shard": config.shard} if config.format == "tar" else {}),
        **({"quality": config.quality} if config.quality is not None else {}),
        **({} if config.metadata else {"metadata": False}),
        **({"score": search(config.score)} if config.score else {}),
        **({"keep": asdict(config.keep)} if config.keep else {}),
    }


def _adapter(one: AdapterConfig) -> dict[str, Any]:
    # Folders that were begun without strengths go on.
    scale = {} if one.scale == 1 else {"scale": one.scale}
    return {"file": one.file, "sha256": _of_file(adapter_file(one.file)), **scale}


def _of_file(file: Path) -> str:
    status = file.stat()
    return _digest(file, status.st_size, status.st_mtime_ns)[:16]


@functools.cache
def _digest(file: Path, size: int, changed: int) -> str:
    """Of a file's content, read once for all cells of a grid."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _stamp(folder: Path) -> str | None:
    """Tells the weights of a model folder from those that replace them, without reading gigabytes; None for a name."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        status = file.stat()
        digest.update(f"{file.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
