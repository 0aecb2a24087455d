"""``y = x W`` for a few rows, from weights as they are stored: 2 bits each. Twin: ``packed_matmul`` of
:mod:`axolotl_bitnet.ops.packed`.

A model that writes text multiplies one row at a time, and waits for its weights: the time is their bytes over
the memory's bandwidth. So they are read as they are in the file, once, and unpacked in registers. A byte
holds four rows of the matrix, so a tile of bytes is multiplied four times, shifted by 0, 2, 4 and 6 bits. The
bits are the code plus one; the sum of a row's codes is subtracted at the end. All of that is exact integer
arithmetic, and the final scaling is the definition's.

One row to four go by :mod:`.matvec`. From five on:

1. ``_quantize``: codes, scale and sum of each row of x.
2. ``_decode``: programs share the tiles of bytes, and where there are fewer tiles than multiprocessors, a
   tile's columns; the last program to finish a tile adds the integers up and scales them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import quantize_activations
from .arithmetic import (
    EPSILON,
    INTERPRET,
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

MAX_ROWS = 16
"""Rows of x that the kernel takes; for more, the product for training is quicker."""

MOST_WORDS = 4
"""Rows of x up to which dot products of words (:mod:`.matvec`) are quicker than tensor cores."""

_SMALL = 1 << 20  # bytes of a weight that a kernel alone reads sooner without overlap

_CHUNK = 2048  # elements of a row quantized together


@triton.jit
def _quantize(
    x_ptr, codes_ptr, r_ptr, sum_ptr, tickets_ptr, columns, x_row, tickets,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TICKETS: tl.constexpr,
    OVERLAP: tl.constexpr,
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
        ticket = tl.arange(0, TICKETS)
        tl.store(tickets_ptr + ticket, tl.zeros((TICKETS,), tl.int32), mask=ticket < tickets)


@triton.constexpr_function
def _take(shift):
    return f"{{ .reg .b32 t; shr.b32 t, $1, {shift}; and.b32 $0, t, 0x03030303; }}"


@triton.jit
def _quarter(byte, SHIFT: tl.constexpr):
    """Codes plus one of the rows at ``SHIFT`` bits of each byte, int8; four bytes at a time on a GPU."""
    if INTERPRET:
        return ((byte >> SHIFT) & 3).to(tl.int8)
    return tl.inline_asm_elementwise(_take(SHIFT), "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit(do_not_specialize=["rows"])
def _decode(
    x_ptr, r_ptr, sum_ptr, w_ptr, table_ptr, s_ptr, bias_ptr, y_ptr, shares_ptr, tickets_ptr,
    rows, out_features, byte_rows, columns, span,
    BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // SPLIT
    share = tl.program_id(0) % SPLIT
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    m = tl.arange(0, BLOCK_M)
    # Each warp walks over columns of its own: the first axis of a batched product.
    begin = (share * WARPS + tl.arange(0, WARPS)) * span
    k = begin[:, None] + tl.arange(0, BLOCK_K)[None, :]
    w_place = (tl.minimum(b, byte_rows - 1).to(tl.int64) * columns)[None, :, None] + k[:, None, :]
    x_place = (tl.minimum(m, rows - 1) * columns)[None, None, :] + k[:, :, None]
    first = tl.zeros((WARPS, BLOCK_B, BLOCK_M), tl.int32)
    second = tl.zeros((WARPS, BLOCK_B, BLOCK_M), tl.int32)
    third = tl.zeros((WARPS, BLOCK_B, BLOCK_M), tl.int32)
    fourth = tl.zeros((WARPS, BLOCK_B, BLOCK_M), tl.int32)
    for start in range(0, span, BLOCK_K):
        if EVEN:
            w = tl.load(w_ptr + w_place + start)
            x = tl.load(x_ptr + x_place + start)
        else:
            inside = start + k < columns
            w = tl.load(w_ptr + w_place + start, mask=inside[:, None, :], other=0)
            x = tl.load(x_ptr + x_place + start, mask=inside[:, :, None], other=0)
        first = tl.dot(_quarter(w, 0), x, first, out_dtype=tl.int32)
        second = tl.dot(_quarter(w, 2), x, second, out_dtype=tl.int32)
        third = tl.dot(_quarter(w, 4), x, third, out_dtype=tl.int32)
        fourth = tl.dot(_quarter(w, 6), x, fourth, out_dtype=tl.int32)

    _finish(
        tl.sum(first, axis=0), tl.sum(second, axis=0), tl.sum(third, axis=0), tl.sum(fourth, axis=0),
        r_ptr, sum_ptr, table_ptr, s_ptr, bias_ptr, y_ptr, shares_ptr, tickets_ptr,
        rows, out_features, byte_rows, tile, share, b, m, BLOCK_M, BLOCK_B, SPLIT, HAS_BIAS,
    )  # fmt: skip


@triton.jit
def _finish(
    first, second, third, fourth, r_ptr, sum_ptr, table_ptr, s_ptr, bias_ptr, y_ptr, shares_ptr, tickets_ptr,
    rows, out_features, byte_rows, tile, share, b, m,
    BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Add up the shares of a tile, if it is divided, then scale and write it: the last program does."""
    used = (b < byte_rows)[:, None] & (m < rows)[None, :]
    last = True
    if SPLIT > 1:
        size = tl.cdiv(byte_rows, BLOCK_B) * BLOCK_B * BLOCK_M
        place = (b * BLOCK_M)[:, None] + m[None, :]
        mine = shares_ptr + share * 4 * size + place
        tl.store(mine, first, mask=used)
        tl.store(mine + size, second, mask=used)
        tl.store(mine + 2 * size, third, mask=used)
        tl.store(mine + 3 * size, fourth, mask=used)
        tl.debug_barrier()
        last = tl.atomic_add(tickets_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            for other in range(1, SPLIT):
                theirs = shares_ptr + (share + other) % SPLIT * 4 * size + place
                first += tl.load(theirs, mask=used, other=0, cache_modifier=".cg")
                second += tl.load(theirs + size, mask=used, other=0, cache_modifier=".cg")
                third += tl.load(theirs + 2 * size, mask=used, other=0, cache_modifier=".cg")
                fourth += tl.load(theirs + 3 * size, mask=used, other=0, cache_modifier=".cg")
        total = tl.load(sum_ptr + m, mask=m < rows, other=0)[None, :]
        n = tl.load(table_ptr + b, mask=b < byte_rows, other=0)
        step = tl.load(table_ptr + byte_rows + b, mask=b < byte_rows, other=0)
        matrix = tl.load(table_ptr + 2 * byte_rows + b, mask=b < byte_rows, other=0)
        scale = tl.load(r_ptr + m, mask=m < rows, other=1.0)[None, :] * tl.load(s_ptr + matrix)[:, None]
        y_rows = y_ptr + (m * out_features)[None, :]
        _store(first - total, scale, bias_ptr, y_rows, n, used, HAS_BIAS)
        _store(second - total, scale, bias_ptr, y_rows, n + step, used, HAS_BIAS)
        _store(third - total, scale, bias_ptr, y_rows, n + 2 * step, used, HAS_BIAS)
        _store(fourth - total, scale, bias_ptr, y_rows, n + 3 * step, used, HAS_BIAS)


@triton.jit
def _store(product, scale, bias_ptr, y_rows, n, used, HAS_BIAS: tl.constexpr):
    """``product / scale``, correctly rounded, as y's dtype, plus the bias."""
    dtype: tl.constexpr = y_rows.dtype.element_ty
    y = cast(tl.div_rn(product.to(tl.float32), scale), dtype)
    if HAS_BIAS:
        bias = cast(tl.load(bias_ptr + n).to(tl.float32), dtype).to(tl.float32)
        y = cast(y.to(tl.float32) + bias[:, None], dtype)
    tl.store(y_rows + n[:, None], y, mask=used)


class Cut(NamedTuple):
    """How a product is cut: columns a step of the loop, warps of a program, stages of loads, and how many
    programs share a tile's columns."""

    k: int
    warps: int
    stages: int
    split: int


_BYTE_ROWS = 16  # of a tile: as many as the tensor cores take


def cut(byte_rows: int, columns: int, multiprocessors: int) -> Cut:
    """As measured on an H100 (benchmarks/results/decode.csv)."""
    tiles, steps = ceil_div(byte_rows, _BYTE_ROWS), ceil_div(columns, 128)
    if steps < 4:  # one warp, whose registers do not hold more where rows begin at any byte
        return Cut(32, 1, 4, 1)
    return Cut(128, 4, 4, min(ceil_div(2 * multiprocessors, tiles), max(1, steps // 8)))


@cache
def _multiprocessors(index: int) -> int:
    return 2 if index < 0 else torch.cuda.get_device_properties(index).multi_processor_count


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
    if rows.shape[0] <= MAX_ROWS:
        return _few_rows(x, rows, packed, s, tuple(sizes), bias, dtype)
    codes, r = quantize_activations(x, dtype)
    found, row = [], 0
    for matrix, size in enumerate(sizes):
        codes_w = unpack_codes(packed[row // 4 : (row + size) // 4])
        part = None if bias is None else bias[row : row + size]
        found.append(matmul(codes, r, codes_w, s[matrix : matrix + 1], part, dtype))
        row += size
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _few_rows(
    x: Tensor, rows: Tensor, packed: Tensor, s: Tensor, sizes: tuple[int, ...], bias: Tensor | None,
    dtype: torch.dtype, how: Cut | Tile | None = None, overlap: bool | None = None,
) -> Tensor:  # fmt: skip
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    count, columns = rows.shape
    byte_rows, device, index = packed.shape[0], x.device, x.get_device()
    if how is None:
        words = count <= MOST_WORDS and columns % 64 == 0 and all(aligned(packed))
        how = tile(byte_rows, columns, count) if words else cut(byte_rows, columns, _multiprocessors(index))
    if overlap is None:
        overlap = isinstance(how, Tile) and overlaps(index) and (packed.numel() > _SMALL or not how.whole)
    y = torch.empty(*x.shape[:-1], byte_rows * 4, dtype=dtype, device=device)
    table = row_table(sizes, device)
    if isinstance(how, Tile) and how.whole:
        matvec(rows, None, packed, table, s, bias, y, how, overlap)
        return y

    tiles, block_m = ceil_div(byte_rows, _BYTE_ROWS), 8 if count <= 8 else 16
    codes = torch.empty(count, columns, dtype=torch.int8, device=device)
    r = torch.empty(count, dtype=torch.float32, device=device)
    sums = torch.empty(count + tiles, dtype=torch.int32, device=device)
    tickets = sums[count:]
    chunk = min(_CHUNK, power_of_2(columns))
    key: tuple[Any, ...] = (rows.dtype, dtype, columns, rows.stride(0), tiles, overlap, *aligned(rows))
    args: tuple[Any, ...] = (
        rows, codes, r, sums, tickets, columns, rows.stride(0), tiles,
        triton_dtype(dtype), chunk, ceil_div(columns, chunk), power_of_2(tiles), overlap,
    )  # fmt: skip
    launch(_quantize, count, index, key, args, warps=8 if chunk == _CHUNK else 1, overlap=overlap)
    if isinstance(how, Tile):
        matvec(codes, (r, sums), packed, table, s, bias, y, how, overlap)
        return y

    shares = sums
    if how.split > 1:
        shares = torch.empty(how.split * 4 * tiles * _BYTE_ROWS * block_m, dtype=torch.int32, device=device)
    span = ceil_div(columns, how.k * how.warps * how.split) * how.k
    even = span * how.warps * how.split == columns
    key = (
        dtype, count, byte_rows, columns, len(sizes), how,
        *aligned(packed), None if bias is None else (bias.dtype, *aligned(bias)),
    )  # fmt: skip
    args = (
        codes, r, sums, packed, table, s, s if bias is None else bias, y, shares, tickets,
        count, byte_rows * 4, byte_rows, columns, span,
        block_m, _BYTE_ROWS, how.k, how.warps, how.split, even, bias is not None,
    )  # fmt: skip
    launch(_decode, tiles * how.split, index, key, args, how.warps, how.stages)
    return y
