"""Refuse bad data before any training: a wrong caption or a broken file costs a run, finding it costs seconds."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from visiontune.data.base import Sample, listed
from visiontune.errors import UserError


def preflight(samples: Sequence[Sample]) -> None:
    """Decode every image and look at every caption.

    Raises:
        UserError: one line that lists empty captions, unreadable images, captions without an image and pairs of which
            one image is missing (the first ten names of each, and how many more), or says that there are no samples.
    """
    if not samples:
        raise UserError("the dataset has no samples: put images with captions into data.root")
    with ThreadPoolExecutor() as pool:
        faults = list(tqdm(pool.map(_image_fault, samples), "checking images", len(samples), delay=1, leave=False))
    missing = [s.id for s, fault in zip(samples, faults, strict=True) if fault == "missing"]
    half = [s.id for s, fault in zip(samples, faults, strict=True) if fault == "half"]
    broken = [s.id for s, fault in zip(samples, faults, strict=True) if fault == "broken"]
    empty = [s.id for s in samples if not s.caption.strip() and s.id not in (*missing, *half)]
    lists = {
        "empty or missing captions (write them, or set data.prompt where there is no caption file)": empty,
        "unreadable images (replace or remove them)": broken,
        "captions without an image (add the image or remove the caption)": missing,
        "pairs without a partner (add the missing image, chosen or rejected, or remove the other)": half,
    }
    problems = [f"{len(names)} {what}: {listed(names)}" for what, names in lists.items() if names]
    if problems:
        raise UserError("; ".join(problems))


def _image_fault(sample: Sample) -> str | None:
    partner = sample.partner()
    if isinstance(sample.image, Path) and not sample.image.is_file():
        return "missing" if partner is None else "half"
    if partner is not None and isinstance(partner.image, Path) and not partner.image.is_file():
        return "half"
    try:
        sample.open()
        if partner is not None:
            partner.open()
    except Exception:  # a damaged file can raise nearly anything from inside a decoder
        return "broken"
    return None
