"""Check a recipe without training: data, model, adapter, noise levels, and what a step costs in time and memory.

visiontune check personalise/oft data.root=my_photos
visiontune check personalise/oft data.root=my_photos --fit 24GB
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from visiontune.cli.words import add_words, split
from visiontune.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)
    parser.add_argument(
        "--fit",
        metavar="SIZE",
        help="try settings until the peak is at most SIZE (24GB, 24GiB), a few steps each; all tries them all",
    )


def run(args: argparse.Namespace) -> None:
    from visiontune import config

    # Torch's profiler, which counts what the CPU's allocator gives, notes its own work on standard error.
    for name, level in (("KINETO_LOG_LEVEL", "9"), ("TORCH_CPP_LOG_LEVEL", "ERROR")):
        os.environ.setdefault(name, level)
    recipe, overrides = split(args.words)
    run = config.load_run(recipe, overrides)
    print(f"recipe: every option is known; the run would write to {run.folder}", flush=True)
    from visiontune.assemble import judged

    judge = judged.judge_of(run)
    if args.fit is None:
        from visiontune.estimate import measure

        print(measure(run).text())
    if run.judge is not None and judge is None:
        print(f"judge: nobody can: {judged.NOBODY}")
    if args.fit is not None:
        _fit(recipe, overrides, args.fit)


def _fit(recipe: str, overrides: Sequence[str], wanted: str) -> None:
    """Print the rungs as they are measured, and what fits."""
    from visiontune import config, fit
    from visiontune.estimate import size

    most = fit.parse(wanted)
    least = None
    for rung in fit.climb(lambda words: config.load_run(recipe, [*overrides, *words]), most):
        if not rung.words and rung.estimate is not None:
            print(rung.estimate.text(), f"{'peak':>10}  {'time':>12}  setting", sep="\n")
        print(rung.text(), flush=True)
        if rung.fits(most):
            print(f"fits {wanted}: {' '.join(rung.words) or 'the recipe as it is'}")
            return
        if rung.estimate is not None:
            least = min(filter(None, (least, rung.estimate.memory_bytes)))
    if most is not None:
        said = f"the least is {size(least)}" if least else "none could be measured on this device"
        raise UserError(
            f"no setting fits {wanted}: {said}; take a smaller data.resolution, fewer adapter.targets or another model"
        )
