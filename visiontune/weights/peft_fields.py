"""What each option of PEFT's configurations means for reading an adapter: read, without effect, or refused.

PEFT writes every option of a method beside its tensors, into ``adapter_config.json`` or the header of diffusers' files.
Some change what the tensors mean. A start that moves the base's weights (PiSSA, OLoRA, ...) leaves tensors that fit the
moved base only. Each method has one table, and an option that is in none is refused unless it says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from visiontune import outside
from visiontune.errors import UserError
from visiontune.outside import shown

_MERGE = "merge the adapter in PEFT (merge_and_unload) and use that model"
_CONVERT = (
    "the start moved the base's weights; let PEFT make a plain LoRA of it by "
    "save_pretrained(folder, path_initial_model_for_weight_conversion=START), or merge it there (merge_and_unload)"
)


class Read(NamedTuple):
    """An option that is read; ``kind`` is what its value must be."""

    kind: str


class Harmless(NamedTuple):
    """An option that changes nothing of what the tensors mean, and why."""

    why: str


class Refused(NamedTuple):
    """An option that changes what the tensors mean where it is none of ``fine``; nothing at all is always fine."""

    why: str
    mend: str = _MERGE
    fine: tuple[Any, ...] = ()


class Start(NamedTuple):
    """How the tensors began: those of ``fine`` leave the base as it is."""

    fine: tuple[Any, ...]


Rule = Read | Harmless | Refused | Start
_KEYS = Harmless("the tensors' names say which layers")
_NOTE = Harmless("a note of the writer")
_SHAPE = Harmless("the tensors' shapes say it")
_TRAINING = Harmless("acts in training only")

_EVERY: dict[str, Rule] = {
    "task_type": _NOTE,
    "peft_type": Read("text"),
    "auto_mapping": _NOTE,
    "peft_version": _NOTE,
    "base_model_name_or_path": _NOTE,
    "revision": _NOTE,
    "inference_mode": _NOTE,
    "target_modules": _KEYS,
    "exclude_modules": _KEYS,
    "layers_to_transform": _KEYS,
    "layers_pattern": _KEYS,
    "fan_in_fan_out": Harmless("PEFT takes it back on linear layers, and convolutions have no use for it"),
    "bias": Refused("biases of the base were trained", fine=("none",)),
    "modules_to_save": Refused("whole modules were trained beside the adapter"),
}
_LORA: dict[str, Rule] = {
    "r": _SHAPE,
    "rank_pattern": _SHAPE,
    "lora_alpha": Read("number"),
    "alpha_pattern": Read("numbers by name"),
    "use_rslora": Read("yes or no"),
    "use_dora": Harmless("the lengths of the rows lie among the tensors"),
    "lora_dropout": _TRAINING,
    "init_lora_weights": Start((True, False, "gaussian", "eva", "orthogonal", "mica")),
    "megatron_config": Refused("the layers are Megatron's"),
    "megatron_core": Harmless("names a module for megatron_config"),
    "trainable_token_indices": Refused("single tokens of an embedding were trained"),
    "loftq_config": Harmless("belongs to a start, which init_lora_weights names"),
    "eva_config": Harmless("belongs to a start, which init_lora_weights names"),
    "corda_config": Harmless("belongs to a start, which init_lora_weights names"),
    "lora_ga_config": Harmless("belongs to a start, which init_lora_weights names"),
    "velora_config": Refused("statistics for a backward pass of its own lie among the tensors"),
    "alora_invocation_tokens": Refused("the adapter acts after certain tokens only"),
    "use_qalora": Refused("inputs are pooled before the first factor"),
    "qalora_group_size": Harmless("belongs to use_qalora"),
    "monteclora_config": Refused("the factors are drawn at random"),
    "layer_replication": Refused("layers of the base were repeated"),
    "runtime_config": Harmless("says how to compute, not what"),
    "lora_bias": Refused("the second factor has a bias"),
    "target_parameters": Refused("parameters that are no layers were trained"),
    "use_bdlora": Refused("the factors are block-diagonal"),
    "arrow_config": Refused("several adapters are mixed by the input"),
    "kasa_config": Refused("the base was truncated at the start"),
    "ensure_weight_tying": Refused("tied layers share the adapter"),
}
_OFT: dict[str, Rule] = {
    "r": Read("whole number"),
    "oft_block_size": _SHAPE,
    "module_dropout": _TRAINING,
    "init_weights": Start((True, False)),
    "coft": Read("yes or no"),
    "eps": Read("number"),
    "block_share": Read("yes or no"),
    "use_cayley_neumann": Read("yes or no"),
    "num_cayley_neumann_terms": Read("whole number"),
}
_BOFT: dict[str, Rule] = {
    "boft_block_size": _SHAPE,
    "boft_block_num": _SHAPE,
    "boft_n_butterfly_factor": _SHAPE,
    "boft_dropout": _TRAINING,
    "init_weights": Start((True, False)),
}
TABLES: dict[str, dict[str, Rule]] = {"LORA": _EVERY | _LORA, "OFT": _EVERY | _OFT, "BOFT": _EVERY | _BOFT}


def check(config: Mapping[str, Any], method: str, where: str) -> None:
    """Refuse what the tensors' reader would get wrong.

    Args:
        config: PEFT's options by name, whatever a file has for values.
        method: a key of :data:`TABLES`.
        where: the file, for messages.

    Raises:
        UserError: naming the first option that changes what the tensors mean, is unknown, or has an impossible value.
    """
    for name, value in config.items():
        said = f"{where}: PEFT's option {shown(f'{name}={value!r}')}"
        match TABLES[method].get(name):
            case Read(kind):
                if not _is(kind, value):
                    raise UserError(f"{said} should be {kind}: copy the adapter again")
            case Refused(why, mend, fine):
                if value and value not in fine:
                    raise UserError(f"{said} is not read ({why}): {mend}")
            case Start(fine):
                if value is not None and not any(type(value) is type(one) and value == one for one in fine):
                    raise UserError(f"{said} is not read: {_CONVERT}")
            case None:
                if value:
                    raise UserError(f"{said} is not known here, so what it changes is not either: {_MERGE}")


def matches(pattern: str, layer: str, where: str) -> bool:
    """Whether a pattern of PEFT's names a layer, by its end or as a whole.

    Raises:
        UserError: it is no regular expression, or one that does not come to an end.
    """
    # The expression is the file's, and can be one that Python's own matcher would work on for ever.
    return outside.matches(pattern, layer, f"{where}: PEFT's pattern", by_end=True)


def _is(kind: str, value: Any) -> bool:
    if kind == "yes or no":
        return isinstance(value, bool)
    if kind == "numbers by name":
        return not value or (isinstance(value, dict) and all(_is("number", one) for one in value.values()))
    if kind == "text":
        return isinstance(value, str)
    plain = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
    return plain and math.isfinite(value) and (kind == "number" or isinstance(value, int))
