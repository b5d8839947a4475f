"""Check a recipe without training: data, model, adapter, noise levels, and what a step costs in time and memory.

visiontune check personalise/oft data.root=my_photos
"""

from __future__ import annotations

import argparse

from visiontune.cli.words import add_words, split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)


def run(args: argparse.Namespace) -> None:
    from visiontune import config

    run = config.load_run(*split(args.words))
    print(f"recipe: every option is known; the run would write to {run.folder}", flush=True)
    from visiontune.assemble import judged
    from visiontune.estimate import measure

    judge = judged.judge_of(run)
    print(measure(run).text())
    if run.judge is not None and judge is None:
        print(f"judge: nobody can: {judged.NOBODY}")
