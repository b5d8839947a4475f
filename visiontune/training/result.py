"""What a run leaves behind: the trained weights, pictures of before and after, and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from visiontune.adapters._header import called
from visiontune.files import atomic_write, public_name
from visiontune.training import card, checkpoint, home, preview

if TYPE_CHECKING:
    from visiontune.training.loop import Trainer


def place(run: Trainer) -> Path:
    """``adapter.safetensors``, or the folder ``model`` after full fine-tuning."""
    return run.out / ("model" if run.adapters is None else "adapter.safetensors")


def write(run: Trainer, facts: Mapping[str, str]) -> None:
    """Write the results of a run as it stands; ``facts`` are further rows of the card's table.

    The first process does; where networks are sharded the others have to take part in putting them together.
    """
    with run.looking(), run.shards.gathered() if run.sharded and run.shards is not None else nullcontext():
        if run.accelerator.is_main_process:
            _weights(run)
    if not run.accelerator.is_main_process:
        return
    preview.compare(run.out, run.train.steps, run.preview, run.shown)
    trained = f"{sum(p.numel() for p in run.parameters.values()):,}"
    under = run.metadata.get("under")
    assistant = {"trained over (not needed to use it)": public_name(under)} if under else {}
    card.write(
        run.out,
        source=run.model.source,
        task=run.model.task,
        method=None if run.adapters is None else called(run.adapters.method, run.adapters.config),
        train=run.train,
        preview=run.preview,
        facts={"trained parameters": trained, **assistant, **facts},
        metadata=run.metadata,
    )


def _weights(run: Trainer) -> None:
    home.note(run.out, place(run))
    if run.adapters is not None:
        run.adapters.save(place(run), metadata=run.metadata)
        return
    with atomic_write(place(run)) as partial:
        run.model.save(partial)
        checkpoint.remove_folder(place(run))
