"""What other tools call a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from visiontune.errors import UserError
from visiontune.weights.ldm import ldm_names

_KOHYA = {"unet": "lora_unet", "transformer": "lora_transformer", "text_encoder_2": "lora_te2"}


def public_name(layer: str) -> str:
    """The layer's name in published files, in which text encoders keep a level that transformers 5 has dropped."""
    component, _, rest = layer.partition(".")
    if component.startswith("text_encoder") and not rest.startswith(("text_model.", "text_projection")):
        rest = f"text_model.{rest}"
    return f"{component}.{rest}"


def kohya_name(layer: str, two_encoders: bool, ldm: Mapping[str, str] | None = None) -> str:
    """The layer's name in kohya's files.

    Args:
        layer: name with its component in front.
        two_encoders: whether the model has two text encoders, which kohya numbers.
        ldm: layers of the UNet that go by their names in Stability's code, see :func:`ldm_names`.

    Raises:
        UserError: the layer's component is none that the format knows.
    """
    component, _, rest = public_name(layer).partition(".")
    prefixes = {**_KOHYA, "text_encoder": "lora_te1" if two_encoders else "lora_te"}
    if component not in prefixes:
        raise UserError(f"'{layer}' belongs to no component that kohya's format knows: {', '.join(prefixes)}")
    if component == "unet":
        rest = (ldm or {}).get(rest, rest)
    return f"{prefixes[component]}_{rest.replace('.', '_')}"


def kohya_names(layers: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """What kohya's scripts themselves would call ``layers`` of a model with these components.

    They train Stable Diffusion XL in Stability's own code and the others in diffusers', and read no other names.
    """
    unet: Any = modules.get("unet")
    is_xl = getattr(getattr(unet, "config", None), "addition_embed_type", None) == "text_time"
    ldm = ldm_names(unet) if is_xl else {}
    return {layer: kohya_name(layer, "text_encoder_2" in modules, ldm) for layer in layers}
