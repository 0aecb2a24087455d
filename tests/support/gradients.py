"""The codes that an 8-bit gradient of a weight is made of, element by element from the formula in
:mod:`axolotl_bitnet.ops.gradients`.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor


def transposed_gradient(dy: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (out_features, tokens) and ``c`` float32 (out_features, 1)."""
    z = dy.reshape(-1, dy.shape[-1]).float() * r.reshape(-1, 1).reciprocal()
    peak = torch.stack([torch.tensor([1e-30, *column.abs().tolist()]).max() for column in z.t()])
    c = (1 / peak) * 127
    codes = [
        [math.floor(torch.tensor(value) * scale + _noise(value, token, output)) for token, value in column]
        for output, (scale, column) in enumerate(zip(c, map(enumerate, z.t().tolist()), strict=True))
    ]
    return torch.tensor(codes, dtype=torch.int8).reshape(z.shape[::-1]), c[:, None]


def _noise(value: float, token: int, output: int) -> float:
    bits = int.from_bytes(struct.pack("<f", value), "little")
    mixed = (bits ^ token * 0x9E3779B1 ^ output * 0x85EBCA77) % 2**32
    return (mixed * 0xC2B2AE3D % 2**32 >> 16) / 65536
