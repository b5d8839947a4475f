"""Networks beside a UNet that a picture controls it by: ControlNets and T2I-Adapters, opened, checked and asked."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter
from torch import Tensor, nn

from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.guidance.base import Strength
from visiontune.models import pocket
from visiontune.models.sources import pretrained, weights_of

# What a net gives, from the outermost values inwards; of a ControlNet the last is the middle's.
Features = tuple[Tensor, ...]
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_KINDS = {kind.__name__: kind for kind in (ControlNetModel, T2IAdapter)}
# What a ControlNet must have as the UNet has it.
_SHARED = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")
_SKIPS, _MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"
_INSIDE = "down_intrablock_additional_residuals"


def opened(net: Any, term: str) -> Any:
    """A ControlNet or T2I-Adapter: itself, or of a pocket name, a folder or a Hub id.

    Raises:
        UserError: it is none, or cannot be loaded.
    """
    found = _loaded(net, term) if isinstance(net, str) else net
    if not isinstance(found, ControlNetModel | T2IAdapter):
        raise UserError(
            f"{term}: net must be a ControlNetModel or a T2IAdapter of diffusers, or where one lies, not a "
            f"{type(found).__name__}; several are several terms"
        )
    return found


@functools.lru_cache(maxsize=4)
def _loaded(source: str, term: str) -> Any:
    """Loaded once for all steps and batches."""
    place = str(pocket.folder(source, _WEIGHTS)) if source.startswith(pocket.PREFIX) else source
    with weights_of(f"{term}: net '{source}'", "diffusers", place, option="net"):
        name = ControlNetModel.load_config(place).get("_class_name")
        if name not in _KINDS:
            raise UserError(f"{term}: '{source}' is a {name}: give a {' or a '.join(_KINDS)}")
        return pretrained(_KINDS[name], place).eval().requires_grad_(False)


def is_adapter(net: nn.Module) -> bool:
    """Whether it sees the picture alone, and not the latents."""
    return isinstance(net, T2IAdapter)


def kind(net: nn.Module) -> str:
    """What it is called in messages."""
    return "T2I-Adapter" if is_adapter(net) else "ControlNet"


def check(net: Any, network: Network, term: str) -> None:
    """Refuse what does not fit a network: UserError saying why."""
    network.stages(term)
    found = opened(net, term)
    if is_adapter(found):
        _check_levels(_levels_of(found), _levels(network.denoiser), network.source, term)
        return
    mine, unets = (getattr(module, "config") for module in (found, network.denoiser))  # noqa: B009 (untyped)
    for name in _SHARED:
        one, other = (_comparable(config[name]) for config in (mine, unets))
        if one != other:
            raise UserError(
                f"{term}: the ControlNet was made for another base than '{network.source}', with {name} {one} and not "
                f"{other}: take one for this model"
            )


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _check_levels(mine: Sequence[Any], wanted: Sequence[Any], source: str, term: str) -> None:
    """Levels are channels, and pixels or latents a side."""
    unit = mine[0][1] / wanted[0][1]
    scaled = [(channels, stride * unit) for channels, stride in wanted]
    if [(c, float(p)) for c, p in mine] != scaled[: len(mine)]:
        raise UserError(
            f"{term}: the T2I-Adapter was made for another base than '{source}': its levels have "
            f"{[c for c, _ in mine]} channels and {[p for _, p in mine]} pixels a side, where the UNet has "
            f"{[c for c, _ in scaled]} channels and {[f'{p:g}' for _, p in scaled]} pixels"
        )


def _levels(unet: Any) -> list[tuple[int, int]]:
    """Of each place where a UNet takes features: channels, and how many latents a side a value stands for."""
    found, stride = [], 1
    for block in unet.down_blocks:
        inner, stride = stride, stride * (2 if block.downsamplers else 1)
        # Blocks with attention take them before they halve the sides, others after it.
        crossed = getattr(block, "has_cross_attention", False)
        found.append((block.resnets[-1].out_channels, inner if crossed else stride))
    return [*found, (found[-1][0], stride)]


@torch.no_grad()
def _levels_of(adapter: Any) -> list[tuple[int, int]]:
    """Of each level of an adapter: channels, and how many pixels a side a value stands for."""
    side = adapter.total_downscale_factor
    blank = torch.zeros(1, adapter.config.in_channels, side, side, device=adapter.device, dtype=adapter.dtype)
    return [(found.shape[1], side // found.shape[-1]) for found in adapter(blank)]


def pixels_a_latent(net: Any, network: Network) -> int:
    """How many pixels a side of its picture stand for one of the latents."""
    if is_adapter(net):
        return _levels_of(net)[0][1] // _levels(network.denoiser)[0][1]
    return int(2 ** (len(net.config.conditioning_embedding_out_channels) - 1))


def channels(net: Any) -> int:
    """Of its picture."""
    config = net.config
    return int(config.in_channels if is_adapter(net) else config.conditioning_channels)


def told(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a UNet and its ControlNet are both given."""
    names = ("sample", "timestep", "encoder_hidden_states", "added_cond_kwargs")
    return {name: arguments[name] for name in names if name in arguments}


def features(net: Any, arguments: Mapping[str, Any], shown: Tensor) -> Features:
    """What a net gives for a picture [1, c, h, w] in [0, 1], of the rows of a call; of an adapter one row for all."""
    if is_adapter(net):
        return tuple(net(shown))
    down, middle = net(**told(arguments), controlnet_cond=shown, return_dict=False)
    return (*down, middle)


def scaled(found: Iterable[Tensor], strength: Strength, rows: int) -> Features:
    """Features of each of so many rows, with a strength for all, or one for each row of the picture."""
    if isinstance(strength, Tensor):
        strength = strength.repeat(rows // len(strength), 1, 1, 1)
    return tuple((one * strength).expand(rows, -1, -1, -1) for one in found)


def given(arguments: Mapping[str, Any], found: Features, adapter: bool) -> dict[str, Any]:
    """The arguments of a UNet's call, with features added to those that it was given before."""
    if adapter:
        return {**arguments, _INSIDE: _sums(arguments.get(_INSIDE), found)}
    *skips, middle = found
    (middle,) = _sums(None if arguments.get(_MIDDLE) is None else [arguments[_MIDDLE]], [middle])
    return {**arguments, _SKIPS: tuple(_sums(arguments.get(_SKIPS), skips)), _MIDDLE: middle}


def _sums(before: Iterable[Tensor] | None, found: Iterable[Tensor]) -> list[Tensor]:
    pairs = zip_longest(before or (), found)
    return [other if one is None else one if other is None else one + other for one, other in pairs]
