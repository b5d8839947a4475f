"""The model card: a README.md that the Hub can read and a person too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visiontune.files import public_name, write_text
from visiontune.training.config import PreviewConfig, TrainConfig
from visiontune.training.preview import card_images


def write(
    out: Path,
    *,
    source: str,
    task: str,
    method: str | None,
    train: TrainConfig,
    preview: PreviewConfig,
    facts: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> Path:
    """Write ``out/README.md``.

    Args:
        out: the run folder.
        source: the base model, of which a folder is called by its own name. task: what the Hub calls what it does.
        method: what the adapter is called; ``None`` after full fine-tuning.
        train: the run's training options.
        preview: its prompts become the card's widget, with the newest preview of each.
        facts: rows of the table of what was trained.
        metadata: what the weights file's header carries; ``trigger`` and ``prompt`` are used here.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        # The Hub takes names of its own models alone.
        base_model=source if public_name(source) == source else None,
        library_name="visiontune",
        pipeline_tag=task,
        tags=[task, "visiontune", *([method] if method else ["full-fine-tuning"])],
        widget=card_images(out, preview) or None,
        instance_prompt=metadata.get("prompt"),
    )
    path = out / "README.md"
    write_text(path, f"---\n{data.to_yaml()}\n---\n\n{_body(out, source, method, train, facts, metadata)}")
    return path


def _body(
    out: Path,
    source: str,
    method: str | None,
    train: TrainConfig,
    facts: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> str:
    what = f"A {method} adapter for" if method else "A full fine-tune of"
    lines = [f"# {out.name}", "", f"{what} `{public_name(source)}`, trained with visiontune.", ""]
    if metadata.get("trigger"):
        own = ", whose meaning is part of the weights" if train.trigger else ""
        lines += [f"The trained subject answers to `{metadata['trigger']}`{own}.", ""]
    rows = {
        "steps": train.steps,
        "batch size": train.batch_size * train.accumulate,
        "learning rate": train.lr,
        "precision": {"no": "float32"}.get(train.precision, train.precision),
        "weights": f"moving average, decay {train.ema}" if train.ema is not None else "last step",
        **facts,
    }
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    lines.append("`recipe.yaml` holds every option of the run; `visiontune train recipe.yaml name=again` repeats it.")
    return "\n".join(lines) + "\n"
