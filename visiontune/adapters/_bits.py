"""Small whole numbers in few bits: how files hold quantised factors and masks."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes [ceil(n bits / 8)] of the n entries of ``codes``, each below ``2^bits``; bits is 1, 2, 4 or 8.

    The first code has a byte's lowest bits, and what is left of the last byte is zero.
    """
    per_byte = 8 // bits
    flat = codes.reshape(-1).to(torch.uint8)
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % per_byte)).view(-1, per_byte)
    packed = torch.zeros_like(rows[:, 0])
    for i in range(per_byte):
        packed |= rows[:, i] << (i * bits)
    return packed


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The codes (uint8) of a shape that :func:`pack` made ``packed`` of."""
    rows = torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], 1)
    return rows.flatten()[: shape.numel()].view(shape)
