"""What a sampling run is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from visiontune.errors import UserError
from visiontune.schema import option

Scheduler = Literal["model", "ddim", "euler", "dpm++", "unipc", "lcm"]
Format = Literal["png", "webp"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter and how much it acts; a bare value is the file."""

    SHORTHAND: ClassVar[str] = "file"

    file: str = option(help="adapter.safetensors or run folder")
    scale: float = option(1.0, least=-100, greatest=100, help="strength of this one, times adapter_scale")


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    """How an adapter of few steps is to be drawn, as its header says."""

    steps: int = option(25, least=1, greatest=1000, help="denoising steps")
    scheduler: Scheduler = option("model", help="sampler")


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
    adapter: str | AdapterConfig | list[str | AdapterConfig] | None = option(
        None, help="adapter file or run folder, {file: ..., scale: 0.7}, or a list of them, each on top of those before"
    )
    adapter_scale: float = option(1.0, least=-100, greatest=100, help="strength of all adapters; 0 is the base model")
    trust: list[str] = option(
        [],
        help="methods from outside the package whose code an adapter file may have run: [mypackage.mymethod, mine.py]",
    )
    prompts: str | list[str] = option(help=".txt (one prompt a line), .jsonl (prompt or text), one prompt, or a list")
    seeds: int | list[int] = option(
        1, least=0, greatest=2**63 - 1, help="a list of seeds, or a count n for seeds 0 to n-1"
    )
    out: str = option("runs/samples", help="folder that receives images, manifest.jsonl and grid.png")
    steps: int | None = option(
        None, least=1, greatest=100_000, help="denoising steps; null: 25, or what an adapter of few steps was made for"
    )
    cfg_scale: float | None = option(
        None,
        least=-1000,
        greatest=1000,
        help="classifier-free guidance, or what a student of several strengths is told; 1 is none and halves the cost; "
        "null: 4, or 1 where an adapter has guidance of one strength distilled into it",
    )
    guidance: list[str | dict[str, Any]] | None = option(
        None,
        help="terms that guide together: [{pag: 2}, {rescale: {scale: 0.7}}]; on top of cfg_scale, unless one (cfg, "
        "apg, cfg_zero, embedded) takes its place. `visiontune list guidance` names them",
    )
    search: dict[str, Any] | None = option(
        None,
        help="draw more than is kept: {best_of: 8, reward: pocket-clip, held_out: oracle}. `visiontune list search` "
        "names the methods; reward chooses, and held_out, if any, is measured beside it",
    )
    held_out: str | dict[str, Any] | None = option(
        None,
        help="reward that judges what the reward of guidance guides, each picture drawn without it, too; a search has "
        "its own",
    )
    negative_prompt: str = option("", help="prompt of the unconditional branch")
    scheduler: Scheduler | None = option(
        None,
        help="sampler; model is the one that the model came with. null: model, or what an adapter of few steps was "
        "made for",
    )
    batch_size: int = option(8, least=1, greatest=4096, help="images a batch; changes them by rounding only")
    height: int | None = option(
        None, least=8, greatest=16384, multiple=8, help="pixels; the model's own resolution when left out"
    )
    width: int | None = option(
        None, least=8, greatest=16384, multiple=8, help="pixels; the model's own resolution when left out"
    )
    format: Format = option("png", help="png, or lossless webp: smaller, and much faster to write")
    grid: int = option(64, least=0, greatest=4096, help="largest number of images shown in grid.png; 0 for no grid")

    def __post_init__(self) -> None:
        if not self.seed_count:
            raise UserError("seeds names no seed: give a count of at least 1 or a list of seeds")

    @property
    def seed_count(self) -> int:
        """How many seeds there are."""
        return self.seeds if isinstance(self.seeds, int) else len(set(self.seeds))

    def seed_list(self) -> list[int]:
        """The seeds themselves, each once, in the order given."""
        if isinstance(self.seeds, int):
            return list(range(self.seeds))
        return list(dict.fromkeys(self.seeds))

    def adapter_list(self) -> list[AdapterConfig]:
        """The adapters as a list, the lowest first."""
        given = self.adapter if isinstance(self.adapter, list) else [self.adapter]
        named = [AdapterConfig(file=one) if isinstance(one, str) else one for one in given]
        return [one for one in named if one is not None]
