"""The last word on a run: how well it learnt its subject, how much of its base it kept, and where both are best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from visiontune.assemble.parts import open_model, open_objective
from visiontune.config import Run
from visiontune.errors import UserError
from visiontune.files import write_json
from visiontune.training.home import JUDGED

if TYPE_CHECKING:
    from visiontune.evaluation.kept import Judge, Point
    from visiontune.training.loop import Trainer

NOBODY = "name a CLIP, for instance judge.clip=openai/clip-vit-large-patch14"


def judge_of(run: Run) -> Judge | None:
    """Who judges the run when it has ended, opened before it begins; ``None`` for nobody.

    Raises:
        UserError: the CLIP that was named cannot be opened, there is but one picture for it to compare, or none, since
            the objective learns from prompts.
    """
    if run.judge is None:
        return None
    if open_objective(run).needs.online:
        raise UserError(
            f"judge compares with the pictures that a run learns, and objective '{run.objective['name']}' learns from "
            "prompts: leave judge out, and look after such a run by guards"
        )
    from visiontune.evaluation import kept

    options = run.judge
    sizes = {"ordinary": options.prompts, "steps": options.steps, "cfg_scale": options.cfg_scale}
    return kept.judge_of(run, options.clip, seeds=options.seeds, **sizes)


def look(run: Run, trainer: Trainer, judge: Judge | None) -> str:
    """Judge what ``trainer`` has left, write every point to ``judged.json`` in the run's folder, and say the best."""
    if run.judge is None or not trainer.accelerator.is_main_process:
        return ""
    if judge is None:
        return f"not judged: {NOBODY}"
    from visiontune.evaluation import kept

    with trainer.looking():
        found = _points(run, trainer, judge)
    last = [point for point in found if point.step == run.train.steps]
    write_json(run.folder / JUDGED, {"best": vars(kept.best(found)), "points": [vars(point) for point in found]})
    return "\n".join(["judged:", *(f"  {point}" for point in (found[0], *last)), f"  {kept.verdict(found)}"])


def _points(run: Run, trainer: Trainer, judge: Judge) -> Sequence[Point]:
    from visiontune.evaluation import kept

    assert run.judge is not None
    model: Any = trainer.model
    if trainer.adapters is None:
        return _of_all_weights(run, model, judge)
    result = {name: tensor.clone() for name, tensor in trainer.adapters.state_dict().items()}
    earlier = kept.saved(run.folder) if kept.comparable(run.train) else []
    states: list[tuple[int, Any, Sequence[float]]] = [(s, t, [1.0]) for s, t in earlier if s < run.train.steps]
    states.append((run.train.steps, result, run.judge.scales))
    try:
        return list(kept.points(model, trainer.adapters, states, judge))
    finally:
        trainer.adapters.scale = 1.0


def _of_all_weights(run: Run, model: Any, judge: Judge) -> Sequence[Point]:
    """The base, opened anew, and the result, which has one strength."""
    from visiontune.evaluation.kept import point

    base: Any = open_model(run, fetch=False)
    base.to(model.device)
    begun = point(0, 0.0, judge(base))
    del base
    return [begun, point(run.train.steps, 1.0, judge(model))]
