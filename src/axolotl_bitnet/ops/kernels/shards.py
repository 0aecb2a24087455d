"""Shards of weights to 2 bits, and gathered shards back. Twins: ``pack_shard``, ``unpack_shards``,
``transposed_shards`` and ``dequantize_shards`` of :mod:`axolotl_bitnet.ops.weights`, which document the
layout.

A program handles one row of bytes, which is four rows of codes: both are read and written along their rows.
Transposed, the four codes of a byte lie side by side: a program writes a tile of them as 32-bit words.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import cast, ceil_div, power_of_2, reciprocal
from .launch import aligned, launch
from .weights import scale, ternary_codes

if TYPE_CHECKING:
    from ..weights import ShardLayout

_MOST = 2048  # columns of a program
_TILE = 64


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
    packed_ptr, g_ptr, out_ptr, rows, columns, blocks, shard_bytes, shard_rows, shard_stride,
    DEQUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    byte_row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    place = (byte_row // shard_bytes) * shard_stride + (byte_row % shard_bytes) * columns
    byte = tl.load(packed_ptr + place + column, mask=column < columns, other=0).to(tl.int32)
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


def unpack_shards(packed: Tensor, rows: int) -> Tensor:
    """int8 codes (rows, columns) from the bytes of all shards, uint8 (shards, bytes, columns)."""
    return _launch_unpack(packed, None, rows, torch.int8)


def dequantize_shards(packed: Tensor, g: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """``codes / s`` as ``dtype``, (rows, columns)."""
    return _launch_unpack(packed, g, rows, dtype)


def _launch_unpack(packed: Tensor, g: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
    shards, bytes, columns = packed.shape
    if packed.stride()[1:] != (columns, 1):
        packed = packed.contiguous()
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    block = min(_MOST, power_of_2(columns))
    blocks = ceil_div(columns, block)
    cut = (rows, columns, blocks, bytes, ceil_div(rows, shards), packed.stride(0))
    key = (dtype, g is None, *cut, *aligned(packed))
    args = (packed, packed if g is None else g, out, *cut, g is not None, block)
    launch(_unpack, shards * bytes * blocks, packed.get_device(), key, args, warps=max(1, block // 512))
    return out


@triton.jit
def _unpack_transposed(
    packed_ptr, words_ptr, words, columns, shard_bytes, shard_stride, TILE: tl.constexpr
):  # fmt: skip
    across = tl.cdiv(columns, TILE)
    byte_row = (tl.program_id(0) // across) * TILE + tl.arange(0, TILE)
    column = (tl.program_id(0) % across) * TILE + tl.arange(0, TILE)
    inside = (byte_row < words)[:, None] & (column < columns)[None, :]
    place = (byte_row // shard_bytes).to(tl.int64) * shard_stride + (byte_row % shard_bytes) * columns
    byte = tl.load(packed_ptr + place[:, None] + column[None, :], mask=inside, other=0).to(tl.int32)
    word = tl.zeros((TILE, TILE), tl.int32)
    for quarter in tl.static_range(4):
        word = word | (((((byte >> (2 * quarter)) & 3) - 1) & 255) << (8 * quarter))
    out = words_ptr + column[:, None].to(tl.int64) * words + byte_row[None, :]
    tl.store(out, tl.trans(word), mask=tl.trans(inside))


def transposed_shards(packed: Tensor, rows: int) -> Tensor:
    """int8 codes (columns, rows) of the transposed weight.

    Args:
        packed: the bytes of all shards, uint8 (shards, bytes, columns).
        rows: of the weight; a multiple of four times the shards.
    """
    shards, bytes, columns = packed.shape
    if packed.stride()[1:] != (columns, 1):
        packed = packed.contiguous()
    out = torch.empty(columns, rows, dtype=torch.int8, device=packed.device)
    words = shards * bytes
    cut = (words, columns, bytes, packed.stride(0), _TILE)
    programs = ceil_div(words, _TILE) * ceil_div(columns, _TILE)
    key = (*cut, *aligned(packed))
    args = (packed, out.view(torch.int32), *cut)
    launch(_unpack_transposed, programs, packed.get_device(), key, args, warps=4)
    return out


@triton.jit
def _unpack_layer(
    packed_ptr, codes_ptr, table_ptr, packed_size, ALIGNED: tl.constexpr, WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of the table is a weight: its first program, rows, columns, rows and bytes of a shard, and where
    its bytes and codes begin."""
    program = tl.program_id(0).to(tl.int64)
    weight = tl.zeros((), tl.int32)
    for other in tl.static_range(1, WEIGHTS):
        weight += (tl.load(table_ptr + other * 8) <= program).to(tl.int32)
    entry = table_ptr + weight * 8
    program -= tl.load(entry)
    rows = tl.load(entry + 1)
    columns = tl.load(entry + 2)
    shard_rows = tl.load(entry + 3)
    shard_bytes = tl.load(entry + 4)
    packed_at = tl.load(entry + 5)
    codes_at = tl.load(entry + 6)
    blocks = (columns + (BLOCK - 1)) // BLOCK
    byte_row = program // blocks
    shard = byte_row // shard_bytes
    within = byte_row % shard_bytes
    if ALIGNED:  # then every row begins at a multiple of 16 bytes, which loads from a table do not show
        columns = tl.multiple_of(columns, 16)
        packed_at = tl.multiple_of(packed_at, 16)
        codes_at = tl.multiple_of(codes_at, 16)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    place = shard * packed_size + packed_at + within * columns
    byte = tl.load(packed_ptr + place + column, mask=column < columns, other=0).to(tl.int32)
    for quarter in tl.static_range(4):
        inner = within * 4 + quarter
        row = shard * shard_rows + inner
        inside = column < tl.where((inner < shard_rows) & (row < rows), columns, 0)
        codes = ((byte >> (2 * quarter)) & 3) - 1
        tl.store(codes_ptr + codes_at + row * columns + column, codes.to(tl.int8), mask=inside)


def unpack_layer(packed: Tensor, layout: ShardLayout) -> Tensor:
    """int8 codes of several weights, one after the other, in one launch.

    Args:
        packed: uint8 (shards, ``layout.packed_size``), contiguous.
        layout: of the weights.
    """
    codes = torch.empty(layout.codes_size, dtype=torch.int8, device=packed.device)
    block = min(_MOST, power_of_2(max(part.columns for part in layout.parts)))
    table, programs = _table(layout, block, packed.device)
    even = all(part.columns % 16 == 0 for part in layout.parts) and packed.data_ptr() % 16 == 0
    key = (layout.packed_size, even, len(layout.parts), block)
    args = (packed, codes, table, layout.packed_size, even, len(layout.parts), block)
    launch(_unpack_layer, programs, packed.get_device(), key, args, warps=max(1, block // 512))
    return codes


@cache
def _table(layout: ShardLayout, block: int, device: torch.device) -> tuple[Tensor, int]:
    entries, programs = [], 0
    for rows, columns, shard_rows, bytes, packed_at, codes_at in layout.parts:
        entries.append([programs, rows, columns, shard_rows, bytes, packed_at, codes_at, 0])
        programs += layout.shards * bytes * ceil_div(columns, block)
    return torch.tensor(entries, dtype=torch.int64, device=device), programs
