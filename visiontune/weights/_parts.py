"""What the keys of adapter files mean: which part of which layer's change a tensor is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from visiontune.errors import UserError
from visiontune.outside import shown
from visiontune.weights.keys import Native

Find = Callable[[str], Native | None]

_LYCORIS = ("w1", "w1_a", "w1_b", "t1", "w2", "w2_a", "w2_b", "t2")
# Ending of a key -> the part; what is left of the key names the layer.
_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down",
    "_lora.down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up",
    "_lora.up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".scalar": "scalar",
    ".lora_magnitude_vector": "lengths",  # PEFT's
    ".lora_magnitude_vector.weight": "lengths",
    ".dora_scale": "dora_scale",  # LyCORIS's
    ".diff": "diff",
    "_weight.diff": "diff",
    ".diff_b": "diff_b",
    "_bias.diff": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
}
_ENDINGS |= {f".{kind}_{part}": f"{kind}_{part}" for kind in ("hada", "lokr") for part in _LYCORIS}
# PEFT's own state dicts have the adapter's name inside.
_NAMED = re.compile(r"(.*\.(?:lora_A|lora_B|lora_magnitude_vector))\.([^.]+)(\.weight)?")
# What is in keys of formats that are known and not read.
_FOREIGN = {
    ".oft_diag": "the first OFT of LyCORIS",
    ".oft_R": "PEFT's OFT, which is read from the folder that PEFT saved",
    ".boft_": "PEFT's BOFT, which is read from the folder that PEFT saved",
    ".lora_embedding_": "PEFT's LoRA of an embedding",
    ".lora_B.bias": "PEFT's LoRA with biases",
    ".modules_to_save": "PEFT's whole modules beside an adapter",
    ".a1.weight": "GLoRA of LyCORIS",
    ".a2.weight": "GLoRA of LyCORIS",
    ".b1.weight": "GLoRA of LyCORIS",
    ".b2.weight": "GLoRA of LyCORIS",
    ".bm.weight": "GLoRA of LyCORIS",
    ".on_input": "IA3 of LyCORIS",
    ".bias_indices": "an old LoCon with sparse biases",
    ".reshape_weight": "a LoRA for a model of other layers",
    ".set_weight": "ComfyUI's replacement of weights",
}
_BUNDLED = re.compile(r"bundle_emb\.([^.]+)\.")
# Projections of attention processors in diffusers' first files, by their names now: of a UNet, of a text encoder.
_OLD = {"to_q": ("to_q", "q_proj"), "to_k": ("to_k", "k_proj"), "to_v": ("to_v", "v_proj")}
_OLD |= {"to_out": ("to_out.0", "out_proj")}


class Place(NamedTuple):
    """What a key says: the part, what the layer is to the model's, and what the file calls it."""

    part: str
    native: Native
    stem: str


def places(
    path: str | Path, keys: Iterable[str], find: Find, mend: Callable[[], str]
) -> tuple[dict[str, Place], list[str]]:
    """Where every tensor of a file belongs, and the names of embeddings that are bundled with it.

    Args:
        path: for messages.
        keys: of the file.
        find: what a name in the file is to the model's layers, if anything.
        mend: what helps where a key belongs to none.

    Raises:
        UserError: a key of another format, one without its layer, two of the same meaning, or two adapters in one file.
    """
    found, bundled, lost, adapters = dict[str, Place](), set[str](), list[str](), set[str]()
    keys = list(keys)
    for key in keys:
        if match := _BUNDLED.match(key):
            bundled.add(match[1])
            continue
        plain, adapter = _without_adapter(key)
        adapters |= {adapter} if adapter else set()
        readings = list(_readings(plain))
        if not readings:
            raise _foreign(path, key)
        place = next((Place(part, at, stem) for part, stem in readings if (at := _find(stem, find))), None)
        if place is None:
            lost.append(key)
        else:
            found[key] = place
    if len(adapters) > 1:
        raise UserError(f"{path} holds several adapters ({', '.join(map(shown, sorted(adapters)))}): save one of them")
    if lost:
        some = f"{len(lost)} of {len(keys)} keys belong to no layer of this model, such as '{shown(lost[0])}'"
        raise UserError(f"{path}: {some}: {mend()}")
    _refuse_twice(path, found)
    return found, sorted(bundled)


def _readings(key: str) -> Iterable[tuple[str, str]]:
    """Part and the rest of the name, for every ending that the key has; the longest first."""
    for ending in sorted(_ENDINGS, key=len, reverse=True):
        if key.endswith(ending) and len(key) > len(ending):
            yield _ENDINGS[ending], key.removesuffix(ending)


def _without_adapter(key: str) -> tuple[str, str]:
    """A key of PEFT's without the adapter's name, and that name."""
    match = _NAMED.fullmatch(key)
    if match is None or match[2] in ("weight", "bias"):
        return key, ""
    return f"{match[1]}{match[3] or ''}", match[2]


def _find(stem: str, find: Find) -> Native | None:
    stem = stem.replace("base_model.model.", "", 1).replace(".processor.", ".", 1)
    head, _, last = stem.removesuffix("_lora").rpartition(".")
    old = [f"{head}.{now}" for now in _OLD.get(last, ())]
    return next((native for name in (stem, *old) if (native := find(name))), None)


def _refuse_twice(path: str | Path, found: dict[str, Place]) -> None:
    seen: dict[tuple[str, Native], str] = {}
    taken: dict[str, tuple[str, Native]] = {}
    for key, place in found.items():
        other = seen.setdefault(place[:2], key)
        if other != key:
            raise UserError(f"{path}: '{shown(other)}' and '{shown(key)}' are the same part of one layer: keep one")
        for layer in place.native.layers:
            other, native = taken.setdefault(layer, (key, place.native))
            if native != place.native:
                raise UserError(f"{path}: '{shown(other)}' and '{shown(key)}' both change '{layer}': keep one")


def _foreign(path: str | Path, key: str) -> UserError:
    kind = next((kind for mark, kind in _FOREIGN.items() if mark in key), "")
    if kind:
        return UserError(
            f"{path}: '{shown(key)}' belongs to {kind}, a format that is not read here: merge it into its model with "
            "the tool that wrote it"
        )
    return UserError(
        f"{path}: '{shown(key)}' is no key of an adapter that is read here: LoRA, DoRA, LoHa, LoKr, OFT or differences "
        "of weights"
    )
