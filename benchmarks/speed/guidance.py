"""What a stack of guidance costs beyond the network calls that it makes, and PAG beside diffusers' own pipeline.

    python benchmarks/speed/guidance.py

A Stable Diffusion with random weights, wide enough for its arithmetic to take the time; each side draws the same
pictures in the same steps, and the other parts of the pipeline are the same. Sides take turns, and a ratio is the
median over rounds. Writes ``benchmarks/results/speed_guidance.json`` and ``.md``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPAGPipeline
from measure import peak, ratios
from report import main, row

from visiontune.core import Request
from visiontune.diffusion.guidance import CFG
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load

# The tiny pipelines, whose folder has the name of this file, take the place of this folder.
sys.path[0] = str(Path(__file__).parents[2] / "tests")

from tiny import remade, tiny_model  # noqa: E402

STEPS, ROWS, SIDE = 4, 2, 64
WIDE: dict[str, Any] = {"block_out_channels": (64, 128), "sample_size": SIDE // 2, "norm_num_groups": 32}
CFG_SCALE, PAG_SCALE = 4.0, 2.0


def model() -> Any:
    """The pipeline that all sides share."""
    made = tiny_model("sd")
    made.pipe.unet = remade(made.pipe.unet, **WIDE)
    made = type(made)(made.pipe, source="wide")
    made.pipe.scheduler = made.sampler("ddim")
    return made


def drawing(made: Any, specs: list[Any] | None) -> Callable[[], Any]:
    """Pictures by a stack; without terms by the stock pipeline's own guidance."""
    guidance = CFG(scale=CFG_SCALE) if specs is None else GuidanceStack.of(specs)
    requests = [Request(prompt="a red circle", seed=seed) for seed in range(ROWS)]
    return lambda: made.draw(requests, steps=STEPS, guidance=guidance)


def separate(made: Any) -> Callable[[], Any]:
    """The calls that CFG and PAG make, bare: both sides at once, and the prompt's once more."""
    pipe, x = made.pipe, torch.randn(ROWS, *made.latent_shape())
    told = made.embed(["a red circle"] * ROWS).tokens

    @torch.no_grad()
    def calls() -> Any:
        for _ in range(STEPS):
            pipe.unet(torch.cat([x, x]), 500, torch.cat([told, told]))
            last = pipe.unet(x, 500, told)
        return last

    return calls


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    made = model()
    own = drawing(made, None)
    neutral = drawing(made, [{"cfg": CFG_SCALE}, {"pag": 0}, {"slg": 0}])
    found = ratios({"own": own, "neutral": neutral, "cfg": drawing(made, [{"cfg": CFG_SCALE}])}, "own", rounds)
    yield row(0, "terms at strength 0 / the stock pipeline", found["neutral"], 1.01)
    yield row(0, "cfg of the stack / the stock pipeline's", found["cfg"], 1.01)

    stack = drawing(made, [{"apg": CFG_SCALE}, {"pag": PAG_SCALE}])
    calls, decoding = separate(made), torch.randn(ROWS, *made.latent_shape())

    @torch.no_grad()
    def bare() -> Any:
        calls()
        # What the pipeline does besides its steps.
        made.embed(["a red circle", ""] * ROWS)
        return made.decode(decoding)

    found = ratios({"bare": bare, "stack": stack}, "bare", rounds)
    yield row(0, "apg and pag / the calls that they make, and the VAE's", found["stack"], 1.05)

    parts = {**made.pipe.components, "requires_safety_checker": False}
    ours = drawing(made, [{"cfg": CFG_SCALE}, {"pag": PAG_SCALE}])
    stock = StableDiffusionPAGPipeline(**{**parts, "unet": copy.deepcopy(made.pipe.unet)}, pag_applied_layers="mid")
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(ROWS, *made.latent_shape())

    def theirs() -> Any:
        return stock(
            ["a red circle"] * ROWS,
            num_inference_steps=STEPS,
            guidance_scale=CFG_SCALE,
            pag_scale=PAG_SCALE,
            latents=noise,
            height=SIDE,
            width=SIDE,
            output_type="np",
        )

    found = ratios({"theirs": theirs, "ours": ours}, "theirs", rounds)
    yield row(0, "cfg and pag / diffusers' PAG pipeline", found["ours"], 1.0)
    yield row(0, "cfg and pag / diffusers' PAG pipeline, peak", peak(ours) / peak(theirs), 1.0)

    pocket = load("pocket/sd")
    found = ratios(
        {"own": drawing(pocket, None), "neutral": drawing(pocket, [{"cfg": CFG_SCALE}, {"pag": 0}])}, "own", rounds
    )
    yield row(0, "terms at strength 0 / the stock pipeline, pocket-sd", found["neutral"], 1.01)


if __name__ == "__main__":
    main("speed_guidance", __doc__, measure)
