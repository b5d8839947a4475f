"""Quantisation of a frozen denoiser's linear layers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from visiontune.errors import UserError

Kind = Literal["int8", "nf4"]


def quantise(module: nn.Module, kind: Kind) -> None:
    """Store the weights of all linear layers in few bits: ``int8`` by torchao, ``nf4`` by bitsandbytes.

    Raises:
        UserError: the library is not installed.
    """
    try:
        (_int8 if kind == "int8" else _nf4)(module)
    except ImportError as error:
        raise UserError(
            f"model.quantize={kind} needs {'torchao' if kind == 'int8' else 'bitsandbytes'} ({error}): "
            "pip install 'visiontune[quant]'"
        ) from error


def _int8(module: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())


def _nf4(module: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit

    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            # Subclasses do more than a product.
            if type(layer) is nn.Linear:
                setattr(parent, name, _nf4_layer(Linear4bit, layer))


def _nf4_layer(kind: Any, layer: nn.Linear) -> nn.Module:
    weight, bias = layer.weight, layer.bias
    made = kind(layer.in_features, layer.out_features, bias is not None, weight.dtype, quant_type="nf4", device="meta")
    # Repacking in place for one kind of CPU would change the codes.
    made.support_avx512bf16_for_cpu = False
    made.weight = type(made.weight)(weight.data, requires_grad=False, quant_type="nf4", module=made)
    made.bias = bias
    made.train(layer.training)
    return made.to(weight.device)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of numbers: torchao's are dequantised."""
    return tensor if type(tensor).dequantize is torch.Tensor.dequantize else tensor.dequantize()
