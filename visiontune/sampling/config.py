"""What a sampling run is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from visiontune.errors import UserError
from visiontune.schema import option

Scheduler = Literal["model", "ddim", "euler", "dpm++", "unipc", "lcm"]
Format = Literal["png", "webp", "jpg", "tar"]
# Axes of a grid beside prompts and seeds, those first that cost most to change, and their letters in names of files.
AXES = {
    "model": "m",
    "adapter": "a",
    "adapter_scale": "w",
    "guidance": "g",
    "pictures": "p",
    "scheduler": "h",
    "cfg_scale": "c",
    "scores": "s",
    "steps": "t",
}


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
class GridConfig:
    """Axes that are crossed with each other and with prompts and seeds; each takes the place of the option."""

    model: list[str] = option([], help="models")
    adapter: list[str | AdapterConfig | list[str | AdapterConfig] | None] = option(
        [], help="adapters, each as the option has it; null for none: [null, runs/dog, [runs/dog, runs/ink]]"
    )
    adapter_scale: list[float] = option([], least=-100, greatest=100, help="strengths of all adapters")
    guidance: list[list[str | dict[str, Any]] | None] = option(
        [], help="stacks of terms, null for none: [null, [{pag: 2}], [{apg: 6}]]"
    )
    pictures: list[str | list[str]] = option(
        [], help="pictures beside every prompt, each as the option has them: [a.png, b.png] are two of one picture each"
    )
    scheduler: list[Scheduler] = option([], help="samplers")
    cfg_scale: list[float] = option([], least=-1000, greatest=1000, help="scales of classifier-free guidance")
    scores: list[dict[str, float | None]] = option(
        [], least=-1e9, greatest=1e9, help="ratings that are asked for: [{quality: 1}, {quality: 5}]"
    )
    steps: list[int] = option([], least=1, greatest=100_000, help="numbers of denoising steps")
    plot: list[str] = option(
        [],
        help="axes of the sheets plot_*.png: x, y and, if there is a third, that of the pages; prompt and seed are "
        "axes too. What is not named has pages as well. Empty: the first two that are given, or one and the prompts",
    )

    def __post_init__(self) -> None:
        if not self.axes():
            raise UserError(f"it names no axis: give a list to one of {', '.join(AXES)}")
        for name, values in self.axes().items():
            if any(value in values[:i] for i, value in enumerate(values)):
                raise UserError(f"{name} has a value twice, which would be drawn twice: leave one out")
        known = [*self.axes(), "prompt", "seed"]
        for name in self.plot:
            if name not in known:
                raise UserError(f"plot names '{name}', which is no axis here; the axes are {', '.join(known)}")
        if len(self.plot) not in (0, 2, 3) or len({*self.plot}) < len(self.plot):
            raise UserError("plot must be two axes or three, each once: [steps, cfg_scale]")

    def axes(self) -> dict[str, list[Any]]:
        """The axes that are given, and their values."""
        return {name: getattr(self, name) for name in AXES if getattr(self, name)}


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """Which of the pictures that were drawn and scored stay in the folder; a bare number is `top`."""

    SHORTHAND: ClassVar[str] = "top"

    top: int = option(least=1, greatest=1_000_000, help="how many of the best are kept")
    by: str | None = option(None, help="the score that decides, as `score` calls it; null: the only one")
    per: Literal["prompt", "cell", "all"] = option(
        "prompt", help="the best of what: of each prompt, of each prompt in each cell of the grid, or of all pictures"
    )


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Every prompt with every seed, written to one folder."""

    RENAMED: ClassVar[dict[str, str]] = {"grid": "sheet"}

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
    low_bits: str | None = option(
        None, help="file of pipelines/distil/quest.py: draw as the model would in few bits; without adapters"
    )
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
    pictures: str | list[str] | None = option(
        None,
        help="files of the pictures that a model is shown beside every prompt, all of them: what it edits, paints into "
        "or takes up",
    )
    mask: str | None = option(None, help="file of a mask as large as the picture, white where a model paints into it")
    canvas: bool = option(
        False,
        help="show the picture on the left of a wide one and paint on the right, as runs with data.canvas learn it",
    )
    paste: bool = option(
        False, help="take what lies outside of the mask from the picture itself, pixel by pixel, and not from the model"
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
    image_cfg_scale: float | None = option(
        None,
        least=1,
        greatest=1000,
        help="guidance by the picture that is edited, of models of InstructPix2Pix; null: 1.5, as their "
        "pipeline has it",
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
    scores: dict[str, float | None] | None = option(
        None,
        least=-1e9,
        greatest=1e9,
        help="ratings that are asked for, of an adapter that was trained with data.scores: {quality: 5}; null for one: "
        "not told. What is left out is the best",
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
    format: Format = option(
        "png",
        help="png; webp, lossless and much faster to write, unless quality is given; jpg; tar, png pictures "
        "with their rows of the manifest in shards as webdataset reads them",
    )
    quality: int | None = option(None, least=1, greatest=100, help="of lossy pictures; null: webp without loss, jpg 95")
    shard: int = option(1000, least=1, greatest=1_000_000, help="pictures of a shard of format tar")
    metadata: bool = option(
        True, help="write into each picture what it was made with, where other programs look for it"
    )
    sheet: int = option(64, least=0, greatest=4096, help="largest number of images shown in grid.png; 0 for no sheet")
    grid: GridConfig | None = option(
        None, help="draw everything with every value of these lists too: {cfg_scale: [2, 4, 6], steps: [10, 25]}"
    )
    confirm: bool = option(
        False, help="draw a grid of more than 1000 pictures, or more than the disk seems to have room for"
    )
    score: list[str | dict[str, Any]] = option(
        [], help="rewards by which each picture is scored: [oracle, pocket-clip]. `visiontune list rewards` names them"
    )
    score_device: str = option("cpu", help="where the rewards of score run")
    keep: KeepConfig | None = option(
        None, help="of the pictures that were scored, keep the best alone: {top: 2, by: oracle, per: prompt}"
    )
    workers: int = option(
        2, least=0, greatest=256, help="threads that encode and write pictures while the next are drawn; 0 for none"
    )

    def __post_init__(self) -> None:
        if self.canvas and (self.mask is not None or (not self.grid and len(self.picture_list()) != 1)):
            raise UserError("canvas has one picture to show, and is painted into on the right: give one, without mask=")
        if self.paste and (self.mask is None or (self.grid is not None and self.grid.pictures)):
            raise UserError("paste takes from one picture what lies outside of mask=: name both, or leave it out")
        if self.low_bits is not None and (self.adapter is not None or (self.grid is not None and self.grid.adapter)):
            raise UserError("low_bits is of a whole model, and adapters would not be rounded: leave one of them out")
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

    def picture_list(self) -> list[str]:
        """The files of the pictures that are shown."""
        return [self.pictures] if isinstance(self.pictures, str) else self.pictures or []

    def adapter_list(self) -> list[AdapterConfig]:
        """The adapters as a list, the lowest first."""
        given = self.adapter if isinstance(self.adapter, list) else [self.adapter]
        named = [AdapterConfig(file=one) if isinstance(one, str) else one for one in given]
        return [one for one in named if one is not None]
