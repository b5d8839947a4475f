"""`visiontune evaluate compose`: what models can put together, one table for each."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune import files, outside
from visiontune.errors import UserError
from visiontune.ranges import argument
from visiontune.schema import from_mapping, nearest
from visiontune.yaml_text import parse_yaml

if TYPE_CHECKING:
    from visiontune.evaluation.compose import Judge, Report, Task
    from visiontune.sampling.config import SampleConfig

NAME = "compose"
_POCKET, _ORACLE = "pocket/", "oracle"
_COUNT, _DEVICE = 24, "auto"
_OWN: dict[str, Any] = {"count": None, "categories": None, "tasks": None, "judge": None, "guidance": None}
_OWN |= {"steps": None, "cfg_scale": None, "device": _DEVICE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("of compose, and the first and last of clip")
    few, steps = argument(int, least=1, greatest=200), argument(int, least=1, greatest=1000)
    scale = argument(float, least=-1000, greatest=1000)
    own.add_argument("--count", type=few, help=f"prompts a category ({_COUNT}), or of clip pictures a row (200)")
    own.add_argument("--categories", metavar="C,C,...", help="these alone: colour,three")
    own.add_argument("--tasks", type=Path, help="prompts of your own, a .jsonl file of category, prompt and phrases")
    own.add_argument("--judge", help="judge by this reward (vqa_score, clip_score), or the oracle")
    own.add_argument("--guidance", help="draw everything with these terms too, as of sample: '[{t3s2s: ...}]'")
    own.add_argument("--steps", type=steps, help="sampling steps (25, or what an adapter was made for)")
    own.add_argument("--cfg-scale", type=scale, help="guidance scale (4, or what an adapter was made for)")
    own.add_argument("--device", default=_DEVICE, help="where models and judge run (default: %(default)s)")


def refuse(args: argparse.Namespace) -> None:
    """Refuse options of compose in the judgement of a run."""
    found = [*args.words, *given(args)]
    if found:
        raise UserError(f"{' '.join(found)}: is for 'visiontune evaluate compose'; leave it out")


def given(args: argparse.Namespace, but: Collection[str] = ()) -> list[str]:
    """The options of compose that are given, but for some."""
    names = [name for name, usual in _OWN.items() if getattr(args, name) != usual and name not in but]
    return [f"--{name.replace('_', '-')}" for name in names]


def run(args: argparse.Namespace) -> None:
    """Draw, judge and compare.

    Raises:
        UserError: an option of the judgement of a run, a model or a judge that is not there, or none that can judge.
    """
    if args.checkpoints or args.clip or args.scales != "1":
        raise UserError("--scales, --checkpoints and --clip are for the folder of a run: leave them out of compose")
    if args.out:
        files.check_target(args.out.with_suffix(".png"))
    from accelerate import PartialState

    from visiontune.evaluation import compose
    from visiontune.guidance.stack import GuidanceStack
    from visiontune.sampling.sources import Bench, base_of, settled

    drawn = {name: settled(_told(name, args)) for name in args.words or ["pocket/sd"]}
    if args.guidance is not None:
        drawn |= {f"{name}, {args.guidance}": _guided(config, args.guidance) for name, config in drawn.items()}
    stacks = {name: GuidanceStack.of_options(config) for name, config in drawn.items()}
    bases = {name: base_of(config) for name, config in drawn.items()}
    judge, tasks = _opened(args, bases)
    reports: list[Report] = []
    with Bench(PartialState()) as bench:
        for name, config in drawn.items():
            reports.append(
                compose.evaluate(
                    bench.at(config),
                    tasks,
                    judge,
                    name=name,
                    guidance=stacks[name],
                    **{option: getattr(config, option) for option in ("steps", "cfg_scale", "scheduler")},
                    progress=True,
                )
            )
            print(reports[-1].table(), flush=True)
    for report in reports[1:]:
        print(compose.compared(report, reports[0]))
    if args.out:
        _write(args.out, reports)


def _told(name: str, args: argparse.Namespace) -> SampleConfig:
    """How one of those that draw is drawn with: an adapter's file, a run's folder, or a model."""
    from visiontune.sampling.config import SampleConfig

    folder = outside.is_folder(name) and (Path(name).expanduser() / "adapter.safetensors").is_file()
    drawn: dict[str, Any] = {"adapter" if folder or name.endswith(".safetensors") else "model": name}
    return SampleConfig(prompts=[NAME], steps=args.steps, cfg_scale=args.cfg_scale, device=args.device, **drawn)


def _guided(config: SampleConfig, terms: str) -> SampleConfig:
    """The config with terms on top, as they are written."""
    from visiontune.sampling.config import SampleConfig

    given = parse_yaml(terms, "--guidance")
    return replace(config, guidance=from_mapping(SampleConfig, {"prompts": [NAME], "guidance": given}, "").guidance)


def _opened(args: argparse.Namespace, bases: dict[str, str]) -> tuple[Judge, list[Task]]:
    """Who judges, and what is drawn: the pocket world's own prompts where its oracle does or all models are of it."""
    from visiontune.evaluation import compose_pocket, compose_words

    strange = [name for name, base in bases.items() if not base.startswith(_POCKET)]
    judge: Judge
    if args.judge == _ORACLE or (args.judge is None and not strange):
        if args.tasks is not None:
            raise UserError("the oracle judges its own prompts alone: leave --tasks out, or name a reward as --judge")
        judge = compose_pocket.Oracle()
    elif args.judge is None:
        raise UserError(
            f"nobody can judge what '{strange[0]}' draws: name a reward, for instance --judge vqa_score, or --judge "
            "oracle for a model of the pocket world"
        )
    else:
        from visiontune.rewards.loading import load

        judge = compose_words.ByReward(load(args.judge, "--judge"), "cpu" if args.device == _DEVICE else args.device)
    if args.tasks is not None:
        return judge, _chosen(compose_words.read_tasks(args.tasks), args.categories)
    pocket = args.judge == _ORACLE or not strange
    return judge, _chosen((compose_pocket if pocket else compose_words).tasks(args.count or _COUNT), args.categories)


def _chosen(tasks: list[Task], categories: str | None) -> list[Task]:
    """The tasks of some categories.

    Raises:
        UserError: there is none of a name.
    """
    known = list(dict.fromkeys(task.category for task in tasks))
    names = categories.split(",") if categories else known
    for name in names:
        if name not in known:
            raise UserError(f"--categories: no prompt is of '{name}'{nearest(name, known)}")
    return [task for task in tasks if task.category in names]


def _write(file: Path, reports: list[Report]) -> None:
    """Everything as JSON, and the first pictures of each category of each model in a sheet beside it."""
    from visiontune.evaluation import compose
    from visiontune.sampling.grid import grid

    found: dict[str, Any] = {"models": [report.written() for report in reports]}
    found["differences"] = {
        report.model: [vars(one) for one in compose.differences(report, reports[0])] for report in reports[1:]
    }
    files.write_json(file, found)
    shown, columns = [], 8
    for report in reports:
        for row in report.rows:
            own = [i for i, task in enumerate(report.tasks) if task.category == row.category][:columns]
            shown += [(report.pictures[i], report.tasks[i].prompt) for i in own]
            shown += [(None, "")] * (columns - len(own))
    sheet = grid(
        [picture for picture, _ in shown],
        columns,
        [text for _, text in shown],
        row_captions=[f"{report.model}: {row.category}" for report in reports for row in report.rows],
    )
    with files.atomic_write(file.with_suffix(".png")) as partial:
        sheet.save(partial, format="PNG")
    print(f"written: {file}, {file.with_suffix('.png')}")
