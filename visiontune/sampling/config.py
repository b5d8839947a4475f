"""What a sampling run is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from visiontune.errors import UserError
from visiontune.schema import option

Scheduler = Literal["model", "ddim", "euler", "dpm++", "unipc"]
Format = Literal["png", "webp"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Every prompt with every seed, written to one folder."""

    model: str | None = option(
        None,
        help="pocket/sd, a local diffusers folder or a Hub id; null: what the adapter was trained on, if that is on "
        "this machine; without an adapter pocket/sd",
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub model")
    variant: str | None = option(
        None, help="files of weights to read, fp16 for *.fp16.safetensors; null: the plain ones, or the only variant"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", help="number format of the weights")
    device: str = option("auto", help="auto, cpu, cuda, cuda:1, mps")
    adapter: str | list[str] | None = option(None, help="adapter file or run folder, or a list of them")
    adapter_scale: float = option(1.0, help="strength of the adapters; 0 is the base model")
    trust: list[str] = option(
        [],
        help="methods from outside the package whose code an adapter file may have run: [mypackage.mymethod, mine.py]",
    )
    prompts: str | list[str] = option(help=".txt (one prompt a line), .jsonl (prompt or text), one prompt, or a list")
    seeds: int | list[int] = option(1, help="a list of seeds, or a count n for seeds 0 to n-1")
    out: str = option("runs/samples", help="folder that receives images, manifest.jsonl and grid.png")
    steps: int = option(25, help="denoising steps")
    cfg_scale: float = option(4.0, help="classifier-free guidance; 1 is none and halves the cost")
    negative_prompt: str = option("", help="prompt of the unconditional branch")
    scheduler: Scheduler = option("model", help="sampler; model is the one that the model came with")
    batch_size: int = option(8, help="images a batch; changes them by rounding only")
    height: int | None = option(None, help="pixels; the model's own resolution when left out")
    width: int | None = option(None, help="pixels; the model's own resolution when left out")
    format: Format = option("png", help="png, or lossless webp: smaller, and much faster to write")
    grid: int = option(64, help="largest number of images shown in grid.png; 0 for no grid")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.seed_list():
            raise UserError("seeds names no seed: give a count of at least 1 or a list of seeds")

    def seed_list(self) -> list[int]:
        """The seeds themselves, each once, in the order given."""
        if isinstance(self.seeds, int):
            return list(range(self.seeds))
        return list(dict.fromkeys(self.seeds))

    def adapter_list(self) -> list[str]:
        """The adapters as a list."""
        if self.adapter is None:
            return []
        return [self.adapter] if isinstance(self.adapter, str) else list(self.adapter)
