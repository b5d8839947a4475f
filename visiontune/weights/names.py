"""What other tools call a layer."""

from __future__ import annotations

from visiontune.errors import UserError

_KOHYA = {"unet": "lora_unet", "transformer": "lora_transformer", "text_encoder_2": "lora_te2"}


def public_name(layer: str) -> str:
    """The layer's name in published files, in which text encoders keep a level that transformers 5 has dropped."""
    component, _, rest = layer.partition(".")
    if component.startswith("text_encoder") and not rest.startswith("text_model."):
        rest = f"text_model.{rest}"
    return f"{component}.{rest}"


def kohya_name(layer: str, two_encoders: bool) -> str:
    """The layer's name in kohya's files.

    Args:
        layer: name with its component in front.
        two_encoders: whether the model has two text encoders, which kohya numbers.

    Raises:
        UserError: the layer's component is none that the format knows.
    """
    component, _, rest = public_name(layer).partition(".")
    prefixes = {**_KOHYA, "text_encoder": "lora_te1" if two_encoders else "lora_te"}
    if component not in prefixes:
        raise UserError(f"'{layer}' belongs to no component that kohya's format knows: {', '.join(prefixes)}")
    return f"{prefixes[component]}_{rest.replace('.', '_')}"
