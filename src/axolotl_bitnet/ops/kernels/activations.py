"""Activations to int8, one scale per token, and back. Twins in :mod:`axolotl_bitnet.ops.activations`.

One program per row, the whole row in registers: x is read once and the codes are written once, 3 bytes an
element of bfloat16. That is all the traffic there must be, so the kernel runs at the speed of a copy. The row
is held in chunks, as it was read: a row of 9216 then takes the registers of 9216 elements, not of 16384.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import (
    EPSILON,
    as_rows,
    cast,
    ceil_div,
    magnitude,
    power_of_2,
    reciprocal,
    row_codes,
    row_scale,
    triton_dtype,
)
from .launch import aligned, launch


@triton.jit
def _quantize(
    x_ptr, codes_ptr, r_ptr, columns, x_row, x_column, floor,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CHUNK)
    held = ()
    largest = tl.zeros((CHUNK,), tl.int32)
    for chunk in tl.static_range(CHUNKS):
        place = chunk * CHUNK + column
        x = tl.load(x_ptr + row * x_row + place.to(tl.int64) * x_column, mask=place < columns, other=0.0)
        x = cast(x.to(tl.float32), DTYPE)
        largest = tl.maximum(largest, magnitude(x.to(tl.float32)))
        held = held + (x,)  # noqa: RUF005 (Triton knows no star)
    r = row_scale(tl.max(largest, axis=0), floor)
    for chunk in tl.static_range(CHUNKS):
        place = chunk * CHUNK + column
        codes = row_codes(held[chunk].to(tl.float32), r)
        tl.store(codes_ptr + row * columns + place, codes, mask=place < columns)
    tl.store(r_ptr + row, r)


@triton.jit
def _dequantize(codes_ptr, r_ptr, out_ptr, columns, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    codes = tl.load(codes_ptr + row * columns + column, mask=mask).to(tl.float32)
    r = tl.load(r_ptr + row)
    # A division per element costs more than the memory traffic; where the result is rounded to 16 bits
    # anyway, one per row is enough.
    if out_ptr.dtype.element_ty == tl.float32:
        x = tl.div_rn(codes, tl.broadcast_to(r, codes.shape))
    else:
        x = codes * reciprocal(r)
    tl.store(out_ptr + row * columns + column, cast(x, out_ptr.dtype.element_ty), mask=mask)


@cache
def chunks(columns: int) -> tuple[int, int]:
    """How a program holds a row: elements a chunk, and chunks."""
    chunk = min(2048, power_of_2(columns))
    return chunk, ceil_div(columns, chunk)


def quantize_activations(
    x: Tensor, dtype: torch.dtype, floor: float = EPSILON.value
) -> tuple[Tensor, Tensor]:
    """int8 codes of x's shape, contiguous, and float32 scales ``r`` (..., 1).

    Args:
        x: (..., features), not empty, at most 32768 features, floating point, any strides.
        dtype: what x is rounded to first.
        floor: least value of max|x| that the scale takes.
    """
    rows = as_rows(x)
    count, columns = rows.shape
    x_row, x_column = rows.stride()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    r = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    chunk, number = chunks(columns)
    key = (x.dtype, dtype, columns, x_row, x_column, *aligned(rows))
    args = (rows, codes, r, columns, x_row, x_column, floor, triton_dtype(dtype), chunk, number)
    launch(_quantize, count, x.get_device(), key, args, warps=max(1, chunk // (512 if number <= 8 else 256)))
    return codes, r


def dequantize_activations(codes: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes / r`` as ``dtype``: the activations as the forward saw them, for the weight's gradient.

    In 16 bits by way of ``1 / r``, so that the last bit may differ from a division's.

    Args:
        codes: int8 (..., features), contiguous.
        r: float32 (..., 1).
    """
    columns = codes.shape[-1]
    x = torch.empty_like(codes, dtype=dtype)
    block = min(2048, power_of_2(columns))
    blocks = ceil_div(columns, block)
    args = (codes, r, x, columns, blocks, block)
    launch(_dequantize, r.numel() * blocks, codes.get_device(), (dtype, columns), args, max(1, block // 512))
    return x
