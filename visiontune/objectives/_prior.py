"""Prior rows: what is to stay as it is while a subject is learnt, as samples beside the user's own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune.data.base import Sample, Source, has_slots, substitute
from visiontune.data.prompt_files import read_prompts
from visiontune.data.prompts import listed_prompts
from visiontune.data.readers import read
from visiontune.errors import UserError
from visiontune.files import atomic_write, write_json
from visiontune.objectives.base import Tools, draws_clips

if TYPE_CHECKING:
    from visiontune.data.base import Config as DataConfig
    from visiontune.models.pipeline import PipelineModel
    from visiontune.objectives.dreambooth import Config

CLASS_PROMPT = "a photo of a [class]"
EVERYDAY, POCKET = "everyday", "pocket/ordinary"
# Of the order of the prompts, the same in every run, so that runs share their pictures.
_ORDER = 0


def prompts(config: Config, data: DataConfig, source: str) -> list[str]:
    """What the base, which is the model ``source``, draws prior pictures of, in the order of the pictures.

    Raises:
        UserError: ``[class]`` without a class noun; a prompt with the trigger, of which the base knows nothing.
    """
    wanted = config.prior_prompts
    if wanted is None:
        # A pocket model knows few words.
        everything = POCKET if source.startswith("pocket/") else EVERYDAY
        wanted = everything if config.prior == "prediction" else CLASS_PROMPT
    found = (listed_prompts(wanted) if isinstance(wanted, str) else None) or read_prompts(wanted)
    everyone = data.each()
    # What is about a class is so about each.
    given = [(prompt, one) for prompt in found for one in (everyone if has_slots(prompt) else everyone[:1])]
    if len(given) > config.prior_images:
        # The first ones of a list would be of one kind.
        given = random.Random(_ORDER).sample(given, len(given))
    words = [substitute(prompt, one.trigger, one.class_noun) for prompt, one in given]
    named = [prompt for prompt in words if any(_has(prompt, one.trigger) for one in everyone)]
    if named:
        raise UserError(
            f"objective.prior_prompts has '{named[0]}' with the trigger, of which the base knows nothing: leave it out"
        )
    return words


def own(samples: Sequence[Sample], data: DataConfig) -> list[Sample]:
    """The user's pictures under captions without the trigger; none where captions have none."""
    kept = []
    for sample in samples:
        caption = sample.caption
        for one in data.each():
            less = without(caption, one.trigger, one.class_noun)
            caption = caption if less is None else less
        if caption != sample.caption:
            kept.append(dataclasses.replace(sample, caption=caption))
    return kept


def without(caption: str, trigger: str, class_noun: str | None) -> str | None:
    """A caption with the class in the place of the trigger; ``None`` where the trigger is not in it.

    >>> without("a photo of a sks dog", "sks", "dog"), without("sks asleep", "sks", "dog")
    ('a photo of a dog', 'dog asleep')
    """
    if not _has(caption, trigger):
        return None
    noun = class_noun or ""
    put = "" if noun and _has(_word(trigger).sub("", caption), noun) else noun
    return " ".join(_word(trigger).sub(put, caption).split())


def _has(text: str, word: str) -> bool:
    return bool(_word(word).search(text))


def _word(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------- pictures


def given(folder: str, data: DataConfig) -> list[Sample]:
    """The user's pictures of what is to be kept."""
    own = data.parts()[0]  # at all noise, whatever range the run's first source has
    return read(dataclasses.replace(own, root=folder, columns={}, prompt=None, subjects=[]))


def drawn(config: Config, model: PipelineModel, words: list[str], cache_dir: Path, tools: Tools) -> list[Sample]:
    """Pictures that the base draws of ``words`` by turns, from the cache as far as they are there.

    Raises:
        UserError: the model draws clips.
    """
    if draws_clips(model):
        raise UserError(
            f"prior pictures are no clips, and '{model.source}' ({model.family}) draws clips: set objective.prior=none"
        )
    settings = _settings(config, model, words)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / f"prior-{key}"
    files = {folder / f"{i:05d}.png": words[i % len(words)] for i in range(config.prior_images)}
    with tools.reference():
        _draw(config, model, settings, files, tools)
    return [
        Sample(id=f"{folder.name}/{file.name}", sources={"image": Source(file)}, caption=prompt)
        for file, prompt in files.items()
    ]


def _settings(config: Config, model: PipelineModel, words: list[str]) -> dict[str, Any]:
    return {
        "base": {part: model.fingerprint(part) for part in ("denoiser", "text", "vae")},
        "prompts": words,
        "steps": config.prior_steps,
        "cfg_scale": config.prior_cfg_scale,
    }


def _draw(
    config: Config, model: PipelineModel, settings: dict[str, Any], wanted: dict[Path, str], tools: Tools
) -> None:
    """Picture ``i`` has seed ``i``; batches are sampled whole, so that a killed run's pictures end up the same."""
    from PIL import Image
    from tqdm.auto import tqdm

    size, files = config.prior_batch_size, list(wanted)
    chunks = [range(start, min(start + size, len(files))) for start in range(0, len(files), size)]
    chunks = [chunk for chunk in chunks if not all(files[i].exists() for i in chunk)]
    if not chunks:
        return
    write_json(files[0].parent / "settings.json", settings)
    # Runs that begin together, and share the cache, each draw what the others have not come to.
    random.SystemRandom().shuffle(chunks)
    for chunk in tqdm(chunks, desc="prior pictures"):
        if all(files[i].exists() for i in chunk):
            continue
        assert tools.draw is not None
        made = tools.draw(
            model,
            [wanted[files[i]] for i in chunk],
            list(chunk),
            steps=config.prior_steps,
            cfg_scale=config.prior_cfg_scale,
            batch_size=size,
        )
        for i, pixels in zip(chunk, made, strict=True):
            with atomic_write(files[i]) as path:
                Image.fromarray(pixels).save(path)
