"""Gradients to int8 for the two products of an 8-bit backward. Twins in :mod:`axolotl_bitnet.ops.gradients`.

dY is read twice, which is as often as it must be: the scale of a row or of a column is known only when all
of it has been seen. ``_gradient_peaks`` finds the largest elements of rows and of columns: a program is one
warp, which reads parts of some rows, and the maxima of parts are joined by atomics (their order is the same
to a maximum). ``_quantize_gradient`` reads dY again and writes both kinds of codes, one of them transposed.
Where a kernel of ours makes the gradient, it finds the peaks itself (:mod:`.swiglu`), and dY is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gradients import COLUMN_HASH, GRADIENT_FLOOR, HASH, ROW_HASH, padded
from .arithmetic import (
    INFINITY,
    as_rows,
    ceil_div,
    floor,
    fraction,
    magnitude,
    reciprocal,
    row_codes,
    row_scale,
)
from .launch import aligned, launch

_TOKENS, _FEATURES = 128, 64  # a tile that is transposed
ROWS, BLOCK = 64, 256  # of a program that finds peaks, one warp: no barrier for a row's maximum

_FLOOR_BITS = int(torch.tensor(GRADIENT_FLOOR, dtype=torch.float32).view(torch.int32))
_FLOOR, _HASH = tl.constexpr(GRADIENT_FLOOR), tl.constexpr(HASH)
_ROW_HASH, _COLUMN_HASH = tl.constexpr(ROW_HASH), tl.constexpr(COLUMN_HASH)


@triton.jit
def note_row(dy, inverse, largest_ptr, peaks):
    """Join the largest magnitude of a part of a row, as bits, to the row's; ``peaks`` joined with those of
    ``dy * inverse``."""
    tl.atomic_max(largest_ptr, tl.max(magnitude(dy), axis=0), sem="relaxed")
    return tl.maximum(peaks, magnitude(dy * inverse))


@triton.jit
def _gradient_peaks(
    dy_ptr, r_ptr, largest_ptr, peak_ptr, rows, columns, dy_row, dy_column,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, BLOCK)
    first = (tl.program_id(0) // across) * ROWS
    column = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    peaks = tl.zeros((BLOCK,), tl.int32)
    for row in range(first, tl.minimum(first + ROWS, rows)):
        place = tl.cast(row, tl.int64) * dy_row + column.to(tl.int64) * dy_column
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        peaks = note_row(dy, reciprocal(tl.load(r_ptr + row)), largest_ptr + row, peaks)
    tl.atomic_max(peak_ptr + column, peaks, mask=mask, sem="relaxed")


@triton.jit
def _quantize_gradient(
    dy_ptr, r_ptr, largest_ptr, peak_ptr, codes_ptr, scale_ptr, codes_z_ptr, c_ptr,
    rows, columns, padded, dy_row, dy_column, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, FEATURES)
    row = (tl.program_id(0) // across) * TOKENS + tl.arange(0, TOKENS)
    column = (tl.program_id(0) % across) * FEATURES + tl.arange(0, FEATURES)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None].to(tl.int64) * dy_row + column[None, :].to(tl.int64) * dy_column
    dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)

    largest = tl.load(largest_ptr + row, mask=row < rows, other=0.0)
    scale = row_scale(magnitude(largest), _FLOOR)
    peak = tl.load(peak_ptr + column, mask=column < columns, other=1.0)
    c = reciprocal(tl.where(peak < INFINITY, peak, float("nan"))) * 127.0
    if tl.program_id(0) % across == 0:
        tl.store(scale_ptr + row, scale, mask=row < rows)
    if tl.program_id(0) < across:
        tl.store(c_ptr + column, c, mask=column < columns)

    place = row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(codes_ptr + place, row_codes(dy, scale[:, None]), mask=inside)

    z = dy * reciprocal(tl.load(r_ptr + row, mask=row < rows, other=1.0))[:, None]
    row_hash = row.to(tl.uint32) * _ROW_HASH
    column_hash = column.to(tl.uint32) * _COLUMN_HASH
    mixed = z.to(tl.uint32, bitcast=True) ^ row_hash[:, None] ^ column_hash[None, :]
    codes = floor(z * c[None, :] + fraction(mixed * _HASH))
    codes = tl.minimum(tl.maximum(codes, -127), 127)
    codes = tl.where((c == c)[None, :], codes, 0).to(tl.int8)  # of a token beyond the last, 0 as its z
    place = column[:, None].to(tl.int64) * padded + row[None, :]
    tl.store(codes_z_ptr + place, tl.trans(codes), mask=(column < columns)[:, None] & (row < padded)[None, :])


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


def peaks(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The floor's bits, int32 (rows,) and (columns,), to which peaks are joined."""
    both = torch.full((rows + columns,), _FLOOR_BITS, dtype=torch.int32, device=device)
    return both[:rows], both[rows:]


def gradient_peaks(dy: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The largest |dY| of each token, float32 (tokens,), and |dY / r| of each output, (out_features,).

    Args:
        dy: (..., out_features), not empty, floating point, any strides.
        r: float32 (..., 1).
    """
    matrix = as_rows(dy)
    rows, columns = matrix.shape
    largest, peak = peaks(rows, columns, dy.device)
    key = (dy.dtype, rows, columns, *matrix.stride(), *aligned(matrix, peak))
    args = (matrix, r, largest, peak, rows, columns, *matrix.stride(), ROWS, BLOCK)
    launch(
        _gradient_peaks, ceil_div(rows, ROWS) * ceil_div(columns, BLOCK), dy.get_device(), key, args, warps=1
    )
    return largest.view(torch.float32), peak.view(torch.float32)


def quantize_gradient(
    dy: Tensor, r: Tensor, largest: Tensor, peak: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes int8 of dY's shape, contiguous, and their scales, float32 (..., 1); codes of dY / r, int8
    (out_features, tokens and padding), and their scales, float32 (out_features, 1).

    Args:
        dy, r: as in :func:`gradient_peaks`.
        largest, peak: what that gave.
    """
    matrix = as_rows(dy)
    rows, columns = matrix.shape
    codes = torch.empty(dy.shape, dtype=torch.int8, device=dy.device)
    scale = torch.empty((*dy.shape[:-1], 1), dtype=torch.float32, device=dy.device)
    codes_z = torch.empty(columns, padded(rows), dtype=torch.int8, device=dy.device)
    c = torch.empty(columns, 1, dtype=torch.float32, device=dy.device)
    key = (dy.dtype, rows, columns, *matrix.stride(), *aligned(matrix, largest, peak))
    sizes = (rows, columns, codes_z.shape[1], *matrix.stride(), _TOKENS, _FEATURES)
    args = (matrix, r, largest, peak, codes, scale, codes_z, c, *sizes)
    launch(_quantize_gradient, _tiles(codes_z.shape[1], columns), dy.get_device(), key, args, warps=4)
    return codes, scale, codes_z, c


def transposed_activations(codes: Tensor) -> Tensor:
    """int8 (in_features, tokens and padding).

    Args:
        codes: int8 (..., in_features), contiguous, not empty.
    """
    rows, columns = as_rows(codes).shape
    out = torch.empty(columns, padded(rows), dtype=torch.int8, device=codes.device)
    args = (codes, out, rows, columns, out.shape[1], _TOKENS, _FEATURES)
    launch(
        _transposed_activations,
        _tiles(out.shape[1], columns),
        codes.get_device(),
        (rows, columns),
        args,
        warps=4,
    )
    return out


def _tiles(tokens: int, features: int) -> int:
    return ceil_div(tokens, _TOKENS) * ceil_div(features, _FEATURES)
