"""Gradients to int8 for the two products of an 8-bit backward. Twins in :mod:`axolotl_bitnet.ops.gradients`.

dY is read twice, which is as often as it must be: the scale of a row or of a column is known only when all of
it has been seen. ``_quantize_gradient`` holds a row in registers, so that its codes are written from the
first reading (very long rows are read again, from the cache). On the way each program keeps the largest
elements of the columns in its rows, and ``_peak`` joins them. ``_transposed_gradient`` reads dY again, in
tiles, and writes them transposed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gradients import COLUMN_HASH, GRADIENT_FLOOR, HASH, ROW_HASH, padded
from .activations import chunks
from .arithmetic import INFINITY, as_rows, ceil_div, magnitude, power_of_2, reciprocal, row_codes, row_scale
from .launch import aligned, launch

_TOKENS, _FEATURES = 128, 64  # a tile

_FLOOR, _HASH = tl.constexpr(GRADIENT_FLOOR), tl.constexpr(HASH)
_ROW_HASH, _COLUMN_HASH = tl.constexpr(ROW_HASH), tl.constexpr(COLUMN_HASH)


@triton.jit
def _quantize_gradient(
    dy_ptr, r_ptr, codes_ptr, scale_ptr, peaks_ptr, rows, columns, dy_row, dy_column,
    PROGRAMS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, CHUNK)
    peaks = ()
    for _ in tl.static_range(CHUNKS):
        peaks = peaks + (tl.zeros((CHUNK,), tl.int32),)  # noqa: RUF005 (Triton knows no star)
    for step in range(tl.program_id(0), rows, PROGRAMS):
        row = tl.cast(step, tl.int64)
        inverse = reciprocal(tl.load(r_ptr + row))
        held = ()
        seen = ()
        largest = tl.zeros((CHUNK,), tl.int32)
        for chunk in tl.static_range(CHUNKS):
            place = chunk * CHUNK + column
            source = dy_ptr + row * dy_row + place.to(tl.int64) * dy_column
            dy = tl.load(source, mask=place < columns, other=0.0)
            if HOLD:
                held = held + (dy,)  # noqa: RUF005
            dy = dy.to(tl.float32)
            largest = tl.maximum(largest, magnitude(dy))
            seen = seen + (tl.maximum(peaks[chunk], magnitude(dy * inverse)),)  # noqa: RUF005
        peaks = seen
        scale = row_scale(tl.max(largest, axis=0), _FLOOR)
        for chunk in tl.static_range(CHUNKS):
            place = chunk * CHUNK + column
            if HOLD:
                dy = held[chunk]
            else:  # from the cache
                source = dy_ptr + row * dy_row + place.to(tl.int64) * dy_column
                dy = tl.load(source, mask=place < columns, other=0.0)
            codes = row_codes(dy.to(tl.float32), scale)
            tl.store(codes_ptr + row * columns + place, codes, mask=place < columns)
        tl.store(scale_ptr + row, scale)
    for chunk in tl.static_range(CHUNKS):
        place = chunk * CHUNK + column
        tl.store(peaks_ptr + tl.program_id(0) * columns + place, peaks[chunk], mask=place < columns)


@triton.jit
def _peak(peaks_ptr, peak_ptr, columns, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.zeros((ROWS, BLOCK), tl.int32)
    for start in range(0, PROGRAMS, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < PROGRAMS)[:, None] & (column < columns)[None, :]
        place = row[:, None] * columns + column[None, :]
        largest = tl.maximum(largest, tl.load(peaks_ptr + place, mask=inside, other=0))
    peak = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    peak = tl.where(peak < INFINITY, tl.maximum(peak, _FLOOR), float("nan"))
    tl.store(peak_ptr + column, peak, mask=column < columns)


@triton.jit
def _transposed_gradient(
    dy_ptr, r_ptr, peak_ptr, codes_ptr, c_ptr, rows, columns, padded, dy_row, dy_column,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, FEATURES)
    row = (tl.program_id(0) // across) * TOKENS + tl.arange(0, TOKENS)
    column = (tl.program_id(0) % across) * FEATURES + tl.arange(0, FEATURES)
    peak = tl.load(peak_ptr + column, mask=column < columns, other=1.0)
    c = reciprocal(peak) * 127.0
    if tl.program_id(0) < across:
        tl.store(c_ptr + column, c, mask=column < columns)
    inverse = reciprocal(tl.load(r_ptr + row, mask=row < rows, other=1.0))
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None].to(tl.int64) * dy_row + column[None, :].to(tl.int64) * dy_column
    z = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32) * inverse[:, None]
    row_hash = row.to(tl.uint32) * _ROW_HASH
    column_hash = column.to(tl.uint32) * _COLUMN_HASH
    mixed = z.to(tl.uint32, bitcast=True) ^ row_hash[:, None] ^ column_hash[None, :]
    u = ((mixed * _HASH) >> 16).to(tl.int32).to(tl.float32) * (1 / 65536)
    codes = tl.minimum(tl.maximum(tl.floor(z * c[None, :] + u), -127.0), 127.0)
    codes = tl.where((c == c)[None, :] & (row < rows)[:, None], codes, 0.0).to(tl.int8)
    place = column[:, None].to(tl.int64) * padded + row[None, :]
    tl.store(codes_ptr + place, tl.trans(codes), mask=(column < columns)[:, None] & (row < padded)[None, :])


@triton.jit
def _transposed_activations(
    codes_ptr, out_ptr, rows, columns, padded, TOKENS: tl.constexpr, FEATURES: tl.constexpr
):
    across = tl.cdiv(columns, FEATURES)
    row = (tl.program_id(0) // across) * TOKENS + tl.arange(0, TOKENS)
    column = (tl.program_id(0) % across) * FEATURES + tl.arange(0, FEATURES)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    codes = tl.load(codes_ptr + place, mask=inside, other=0)
    place = column[:, None].to(tl.int64) * padded + row[None, :]
    tl.store(out_ptr + place, tl.trans(codes), mask=(column < columns)[:, None] & (row < padded)[None, :])


def quantize_gradient(dy: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 of dY's shape, contiguous, their scales float32 (..., 1), and the largest |dY / r| of each
    column, float32 (out_features,).

    Args:
        dy: (..., out_features), not empty, at most 24576 features, floating point, any strides.
        r: float32 (..., 1).
    """
    matrix = as_rows(dy)
    rows, columns = matrix.shape
    dy_row, dy_column = matrix.stride()
    codes = torch.empty(dy.shape, dtype=torch.int8, device=dy.device)
    scale = torch.empty((*dy.shape[:-1], 1), dtype=torch.float32, device=dy.device)
    chunk, number = chunks(columns)
    programs = min(power_of_2(ceil_div(rows, 16)), 1024 * max(1, 2048 // columns))
    peaks = torch.empty(programs, columns, dtype=torch.int32, device=dy.device)
    peak = torch.empty(columns, dtype=torch.float32, device=dy.device)
    key = (dy.dtype, rows, columns, dy_row, dy_column, *aligned(matrix))
    sizes = (rows, columns, dy_row, dy_column, programs, chunk, number, columns <= 16384)
    args = (matrix, r, codes, scale, peaks, *sizes)
    warps = max(1, min(16, power_of_2(columns) // 1024))
    launch(_quantize_gradient, programs, dy.get_device(), key, args, warps)
    args = (peaks, peak, columns, programs, 64, 32)
    launch(_peak, ceil_div(columns, 32), dy.get_device(), (columns, programs), args, warps=4)
    return codes, scale, peak


def transposed_gradient(dy: Tensor, r: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of dY / r, int8 (out_features, tokens and padding), and their scales, float32 (out_features, 1).

    Args:
        dy, r: as in :func:`quantize_gradient`.
        peak: float32 (out_features,).
    """
    matrix = as_rows(dy)
    rows, columns = matrix.shape
    dy_row, dy_column = matrix.stride()
    codes = torch.empty(columns, padded(rows), dtype=torch.int8, device=dy.device)
    c = torch.empty(columns, 1, dtype=torch.float32, device=dy.device)
    key = (dy.dtype, rows, columns, dy_row, dy_column, *aligned(matrix))
    sizes = (rows, columns, codes.shape[1], dy_row, dy_column, _TOKENS, _FEATURES)
    launch(_transposed_gradient, _tiles(codes), dy.get_device(), key, (matrix, r, peak, codes, c, *sizes), 4)
    return codes, c


def transposed_activations(codes: Tensor) -> Tensor:
    """int8 (in_features, tokens and padding).

    Args:
        codes: int8 (..., in_features), contiguous, not empty.
    """
    rows, columns = as_rows(codes).shape
    out = torch.empty(columns, padded(rows), dtype=torch.int8, device=codes.device)
    args = (codes, out, rows, columns, out.shape[1], _TOKENS, _FEATURES)
    launch(_transposed_activations, _tiles(out), codes.get_device(), (rows, columns), args, warps=4)
    return out


def _tiles(transposed: Tensor) -> int:
    features, tokens = transposed.shape
    return ceil_div(tokens, _TOKENS) * ceil_div(features, _FEATURES)
