"""``y = x W`` for a few rows, from weights as they are stored: 2 bits each. Twin: ``packed_matmul`` of
:mod:`axolotl_bitnet.ops.packed`.

A model that writes text multiplies one row at a time, and waits for its weights: the time is their bytes over
the memory's bandwidth. So they are read as they are in the file, once, and unpacked in registers. A byte
holds four rows of the matrix, so a tile of bytes is multiplied four times, shifted by 0, 2, 4 and 6 bits. The
bits are the code plus one; the sum of a row's codes is subtracted at the end. All of that is exact integer
arithmetic, and the final scaling is the definition's.

1. ``_quantize``: codes, scale and sum of each row of x; or, with one row or two, the kernel of 2. does it.
2. :mod:`.matvec` for one row and two, :mod:`.registers` for more.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import quantize_activations
from .arithmetic import (
    EPSILON,
    as_rows,
    cast,
    ceil_div,
    magnitude,
    power_of_2,
    row_codes,
    row_scale,
    triton_dtype,
)
from .launch import aligned, launch
from .matmul import matmul
from .matvec import Tile, matvec, tile
from .overlap import overlaps, release, wait
from .packing import unpack_codes
from .registers import Rows, cut, few_rows

MAX_ROWS = 16
"""Rows of x that the kernels take; for more than twice as many, the product for training is quicker."""

_SMALL = 1 << 20  # bytes of a weight that a kernel alone reads sooner without overlap

_CHUNK = 2048  # elements of a row quantized together


@triton.jit
def _quantize(
    x_ptr, codes_ptr, r_ptr, sum_ptr, zero_ptr, columns, x_row,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    release(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CHUNK)
    held = ()
    largest = tl.zeros((CHUNK,), tl.int32)
    for chunk in tl.static_range(CHUNKS):
        place = chunk * CHUNK + column
        x = tl.load(x_ptr + row * x_row + place, mask=place < columns, other=0.0)
        x = cast(x.to(tl.float32), DTYPE)
        largest = tl.maximum(largest, magnitude(x.to(tl.float32)))
        held = held + (x,)  # noqa: RUF005 (Triton knows no star)
    r = row_scale(tl.max(largest, axis=0), EPSILON)
    total = tl.zeros((CHUNK,), tl.int32)
    for chunk in tl.static_range(CHUNKS):
        place = chunk * CHUNK + column
        codes = row_codes(held[chunk].to(tl.float32), r)
        total += codes.to(tl.int32)
        tl.store(codes_ptr + row * columns + place, codes, mask=place < columns)
    tl.store(r_ptr + row, r)
    tl.store(sum_ptr + row, tl.sum(total, axis=0))
    if row == 0:
        tl.store(zero_ptr, 0)


@cache
def row_table(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 (3, byte rows): of each row of bytes, the output row of its lowest bits, how many rows lie
    between that and the next bits', and which matrix it belongs to. Made once: nothing is copied to the GPU
    while a graph is captured."""
    table, row = [], 0
    for matrix, size in enumerate(sizes):
        quarter = size // 4
        table += [(row + place, quarter, matrix) for place in range(quarter)]
        row += size
    return torch.tensor(table, dtype=torch.int32).t().contiguous().to(device)


def packed_matmul(
    x: Tensor, packed: Tensor, s: Tensor, sizes: list[int], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x W`` for x (..., K) and weights of 2 bits: (..., out_features) as ``dtype``.

    Args:
        x: at most 32768 columns, not empty.
        packed: uint8 (out_features / 4, K), contiguous: matrices one below the other.
        s: float32 (matrices,).
        sizes: rows of each matrix.
        bias: (out_features,) or None.
        dtype: float32, bfloat16 or float16.
    """
    rows = as_rows(x)
    if rows.shape[0] <= 2 * MAX_ROWS and rows.shape[1] % 64 == 0 and all(aligned(packed)):
        parts = [_few_rows(part, packed, s, tuple(sizes), bias, dtype) for part in rows.split(MAX_ROWS)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], sum(sizes))
    codes, r = quantize_activations(x, dtype)
    found, row = [], 0
    for matrix, size in enumerate(sizes):
        codes_w = unpack_codes(packed[row // 4 : (row + size) // 4])
        part = None if bias is None else bias[row : row + size]
        found.append(matmul(codes, r, codes_w, s[matrix : matrix + 1], part, dtype))
        row += size
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _few_rows(
    rows: Tensor, packed: Tensor, s: Tensor, sizes: tuple[int, ...], bias: Tensor | None,
    dtype: torch.dtype, how: Tile | Rows | None = None, overlap: bool | None = None,
) -> Tensor:  # fmt: skip
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    count, columns = rows.shape
    byte_rows, device, index = packed.shape[0], rows.device, rows.get_device()
    if how is None:
        words = count == 1 or (count == 2 and columns <= 2048)
        how = tile(byte_rows, columns, count) if words else cut(byte_rows, columns, count)
    whole = isinstance(how, Tile) and how.whole
    if overlap is None:
        overlap = overlaps(index) and (packed.numel() > _SMALL or not whole)
    y = torch.empty(count, byte_rows * 4, dtype=dtype, device=device)
    table = row_table(sizes, device)
    if isinstance(how, Tile) and how.whole:
        matvec(rows, None, packed, table, s, bias, y, how, overlap)
        return y

    codes = torch.empty(count, columns, dtype=torch.int8, device=device)
    r = torch.empty(count, dtype=torch.float32, device=device)
    sums = torch.empty(count + 1, dtype=torch.int32, device=device)
    chunk = min(_CHUNK, power_of_2(columns))
    key: tuple[Any, ...] = (rows.dtype, dtype, columns, rows.stride(0), overlap, *aligned(rows))
    args: tuple[Any, ...] = (
        rows, codes, r, sums, sums[count:], columns, rows.stride(0),
        triton_dtype(dtype), chunk, ceil_div(columns, chunk), overlap,
    )  # fmt: skip
    launch(_quantize, count, index, key, args, warps=8 if chunk == _CHUNK else 1, overlap=overlap)
    if isinstance(how, Tile):
        matvec(codes, (r, sums), packed, table, s, bias, y, how, overlap)
    else:
        few_rows(codes, (r, sums), packed, table, s, bias, y, how, overlap)
    return y
