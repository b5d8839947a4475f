"""Heads that read a score off the features of an image encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.models.sources import load_exactly


def linear_head(tensors: dict[str, Tensor], path: Path) -> torch.nn.Sequential:
    """The head that LAION's aesthetic predictor and ImageReward share: linear layers and nothing between them.

    ``tensors`` are ``layers.<i>.weight`` and ``layers.<i>.bias``; the numbers between them are dropouts of training.
    """
    indices = sorted(int(key.split(".")[1]) for key in tensors if key.startswith("layers.") and key.endswith(".weight"))
    shapes = [tensors[f"layers.{i}.weight"].shape for i in indices]
    layers = [torch.nn.Linear(inputs, outputs) for outputs, inputs in shapes]
    head = torch.nn.Sequential(*layers)
    places = {f"layers.{index}": str(place) for place, index in enumerate(indices)}
    parts = {key: key.rpartition(".") for key in tensors}
    renamed = {f"{places.get(layer, layer)}.{kind}": tensors[key] for key, (layer, _, kind) in parts.items()}
    if not layers or layers[-1].out_features != 1:
        raise UserError(f"{path} does not hold a score head: its last linear layer must give one number")
    load_exactly(head, renamed, path)
    return head.eval().requires_grad_(False)
