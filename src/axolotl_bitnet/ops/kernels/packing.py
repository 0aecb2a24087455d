"""Codes to 2 bits and back. Twins: ``pack_codes`` and ``unpack_codes`` of :mod:`axolotl_bitnet.ops.weights`.

A byte holds four rows of a column (the layout is the twin's), so both directions read and write whole,
adjacent bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import ceil_div
from .launch import aligned, launch

_BLOCK = 4096


@triton.jit
def _pack(codes_ptr, packed_ptr, numel, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    byte = tl.zeros((BLOCK,), tl.int32)
    for quarter in tl.static_range(4):
        codes = tl.load(codes_ptr + quarter * tl.cast(numel, tl.int64) + offset, mask=mask, other=0).to(
            tl.int32
        )
        byte = byte | ((codes + 1) << (2 * quarter))
    tl.store(packed_ptr + offset, byte.to(tl.uint8), mask=mask)


@triton.jit
def _unpack(packed_ptr, codes_ptr, numel, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    byte = tl.load(packed_ptr + offset, mask=mask, other=0).to(tl.int32)
    for quarter in tl.static_range(4):
        codes = ((byte >> (2 * quarter)) & 3) - 1
        tl.store(codes_ptr + quarter * tl.cast(numel, tl.int64) + offset, codes.to(tl.int8), mask=mask)


def pack_codes(codes: Tensor) -> Tensor:
    """int8 codes (rows, columns), rows a multiple of 4, to uint8 (rows / 4, columns)."""
    codes = codes.contiguous()
    packed = torch.empty(codes.shape[0] // 4, codes.shape[1], dtype=torch.uint8, device=codes.device)
    numel = packed.numel()
    args = (codes, packed, numel, _BLOCK)
    launch(_pack, ceil_div(numel, _BLOCK), codes.get_device(), (numel, *aligned(codes)), args, warps=8)
    return packed


def unpack_codes(packed: Tensor) -> Tensor:
    """uint8 (rows / 4, columns) to int8 codes (rows, columns)."""
    packed = packed.contiguous()
    codes = torch.empty(packed.shape[0] * 4, packed.shape[1], dtype=torch.int8, device=packed.device)
    numel = packed.numel()
    args = (packed, codes, numel, _BLOCK)
    launch(_unpack, ceil_div(numel, _BLOCK), codes.get_device(), (numel, *aligned(packed)), args, warps=8)
    return codes
