"""Shards of weights to 2 bits, and gathered shards back. Twins: ``pack_shard``, ``unpack_shards`` and
``dequantize_shards`` of :mod:`axolotl_bitnet.ops.weights`, which say the layout.

A program handles one row of bytes, which is four rows of codes: both are read and written along their rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import cast, ceil_div, power_of_2, reciprocal
from .launch import aligned, launch
from .weights import scale, ternary_codes

_MOST = 2048  # columns of a program


@triton.jit
def _pack(w_ptr, g_ptr, packed_ptr, rows, columns, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    byte_row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inverse_g = reciprocal(tl.load(g_ptr))
    byte = tl.zeros((BLOCK,), tl.int32)
    for quarter in tl.static_range(4):
        row = byte_row * 4 + quarter
        inside = column < tl.where(row < rows, columns, 0)
        w = tl.load(w_ptr + row * columns + column, mask=inside, other=0.0)
        byte = byte | ((ternary_codes(w, inverse_g).to(tl.int32) + 1) << (2 * quarter))
    tl.store(packed_ptr + byte_row * columns + column, byte.to(tl.uint8), mask=column < columns)


@triton.jit
def _unpack(
    packed_ptr, g_ptr, out_ptr, rows, columns, blocks, shard_bytes, shard_rows, DEQUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    byte_row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(packed_ptr + byte_row * columns + column, mask=column < columns, other=0).to(tl.int32)
    if DEQUANTIZE:
        inverse_s = reciprocal(scale(tl.load(g_ptr)).to(tl.float32))
    for quarter in tl.static_range(4):
        within = (byte_row % shard_bytes) * 4 + quarter
        row = (byte_row // shard_bytes) * shard_rows + within
        inside = column < tl.where((within < shard_rows) & (row < rows), columns, 0)
        codes = ((byte >> (2 * quarter)) & 3) - 1
        if DEQUANTIZE:
            out = cast(codes.to(tl.float32) * inverse_s, out_ptr.dtype.element_ty)
        else:
            out = codes.to(tl.int8)
        tl.store(out_ptr + row * columns + column, out, mask=inside)


def pack_shard(weight: Tensor, g: Tensor, rows: int) -> Tensor:
    """Codes of a shard under the whole weight's absmean, 2 bits each: uint8 (ceil(rows / 4), columns).

    Args:
        weight: latents (the shard's rows, columns), floating point; it may have no rows.
        g: float32 ().
        rows: at least the shard's; those that it lacks are zero codes.
    """
    weight = weight.contiguous()
    own, columns = weight.shape
    bytes = ceil_div(rows, 4)
    packed = torch.empty(bytes, columns, dtype=torch.uint8, device=weight.device)
    block = min(_MOST, power_of_2(columns))
    blocks = ceil_div(columns, block)
    key = (weight.dtype, own, columns, *aligned(weight))
    args = (weight, g, packed, own, columns, blocks, block)
    launch(_pack, bytes * blocks, weight.get_device(), key, args, warps=max(1, block // 512))
    return packed


def unpack_shards(packed: Tensor, shards: int, rows: int) -> Tensor:
    """int8 codes (rows, columns) from the bytes of all shards, uint8 (shards * bytes, columns)."""
    return _launch_unpack(packed, None, shards, rows, torch.int8)


def dequantize_shards(packed: Tensor, g: Tensor, shards: int, rows: int, dtype: torch.dtype) -> Tensor:
    """``codes / s`` as ``dtype``, (rows, columns)."""
    return _launch_unpack(packed, g, shards, rows, dtype)


def _launch_unpack(packed: Tensor, g: Tensor | None, shards: int, rows: int, dtype: torch.dtype) -> Tensor:
    packed = packed.contiguous()
    bytes, columns = packed.shape
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    block = min(_MOST, power_of_2(columns))
    blocks = ceil_div(columns, block)
    cut = (rows, columns, blocks, bytes // shards, ceil_div(rows, shards))
    key = (dtype, g is None, *cut, *aligned(packed))
    args = (packed, packed if g is None else g, out, *cut, g is not None, block)
    launch(_unpack, bytes * blocks, packed.get_device(), key, args, warps=max(1, block // 512))
    return out
