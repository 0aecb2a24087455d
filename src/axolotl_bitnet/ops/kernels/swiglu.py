"""SwiGLU and the quantization of its product in one pass, forward and backward. Twins in
:mod:`axolotl_bitnet.ops.activations`.

The down projection reads only the codes of ``h = silu(gate) * up``, so these are written and h itself is not.
Elements are rounded as the model's own code rounds them (silu to the model's dtype, then the product), so the
codes are those of the unfused layers. The backward computes h once more, as the down projection's weight
gradient needs it. For an 8-bit backward it also finds what the scales of its gradients follow from, so that
these are read once more, not twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import chunks
from .arithmetic import (
    EPSILON,
    as_rows,
    cast,
    ceil_div,
    divide,
    exp,
    magnitude,
    power_of_2,
    reciprocal,
    round_even,
    row_codes,
    row_scale,
)
from .gradients import BLOCK, ROWS, note_row, peaks
from .launch import aligned, launch

_NOTHING = tl.constexpr(-69.0)  # silu is within 1e-28 of 0 below it, a code of 0, and e**69 is under 2**100


@triton.jit
def _silu(gate, dtype: tl.constexpr):
    """silu rounded to ``dtype``, and the sigmoid's denominator, float32."""
    denominator = 1.0 + exp(-gate)
    silu = tl.where(gate < _NOTHING, gate * 0.0, divide(gate, denominator))  # of an Inf, NaN
    return cast(silu, dtype).to(tl.float32), denominator


@triton.jit
def _swiglu_forward(gate_ptr, up_ptr, codes_ptr, r_ptr, columns, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CHUNK)
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    held = ()
    largest = tl.zeros((CHUNK,), tl.int32)
    for chunk in tl.static_range(CHUNKS):
        place = chunk * CHUNK + column
        gate = tl.load(gate_ptr + row * columns + place, mask=place < columns, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * columns + place, mask=place < columns, other=0.0).to(tl.float32)
        silu, _ = _silu(gate, dtype)
        h = cast(silu * up, dtype)
        largest = tl.maximum(largest, magnitude(h.to(tl.float32)))
        held = held + (h,)  # noqa: RUF005 (Triton knows no star)
    r = row_scale(tl.max(largest, axis=0), EPSILON)
    for chunk in tl.static_range(CHUNKS):
        place = chunk * CHUNK + column
        codes = row_codes(held[chunk].to(tl.float32), r)
        tl.store(codes_ptr + row * columns + place, codes, mask=place < columns)
    tl.store(r_ptr + row, r)


@triton.jit
def _swiglu_backward(
    dh_ptr, gate_ptr, up_ptr, r_ptr, dgate_ptr, dup_ptr, h_ptr, columns, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    place = row * columns + column
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    dh = tl.load(dh_ptr + place, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + row)
    silu, denominator = _silu(gate, dtype)
    h = cast(silu * up, dtype).to(tl.float32)
    if dtype == tl.float32:
        h = tl.div_rn(round_even(h * r), tl.broadcast_to(r, h.shape))
    else:
        h = cast(round_even(h * r) * reciprocal(r), dtype)
    dgate = _dgate(dh, gate, up, denominator)
    tl.store(dgate_ptr + place, cast(dgate, dtype), mask=mask)
    tl.store(dup_ptr + place, cast(dh * silu, dtype), mask=mask)
    tl.store(h_ptr + place, h, mask=mask)


@triton.jit
def _swiglu_gradients(
    dh_ptr, gate_ptr, up_ptr, r_h_ptr, r_ptr, dgate_ptr, dup_ptr, h_ptr, largest_ptr, peak_ptr, rows, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, BLOCK)
    first = (tl.program_id(0) // across) * ROWS
    column = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    gate_peaks = tl.zeros((BLOCK,), tl.int32)
    up_peaks = tl.zeros((BLOCK,), tl.int32)
    for row in range(first, tl.minimum(first + ROWS, rows)):
        place = tl.cast(row, tl.int64) * columns + column
        dh = tl.load(dh_ptr + place, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
        r_h = tl.load(r_h_ptr + row)
        inverse = reciprocal(tl.load(r_ptr + row))
        silu, denominator = _silu(gate, dtype)
        h = row_codes(cast(silu * up, dtype).to(tl.float32), r_h)
        dgate = cast(_dgate(dh, gate, up, denominator), dtype)
        dup = cast(dh * silu, dtype)
        tl.store(dgate_ptr + place, dgate, mask=mask)
        tl.store(dup_ptr + place, dup, mask=mask)
        tl.store(h_ptr + place, h, mask=mask)
        gate_peaks = note_row(dgate.to(tl.float32), inverse, largest_ptr + row, gate_peaks)
        up_peaks = note_row(dup.to(tl.float32), inverse, largest_ptr + rows + row, up_peaks)
    tl.atomic_max(peak_ptr + column, gate_peaks, mask=mask, sem="relaxed")
    tl.atomic_max(peak_ptr + columns + column, up_peaks, mask=mask, sem="relaxed")


@triton.jit
def _dgate(dh, gate, up, denominator):
    sigmoid = tl.where(gate < _NOTHING, 0.0, divide(tl.full(gate.shape, 1.0, tl.float32), denominator))
    return dh * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))


def swiglu_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and scales ``r`` of ``silu(gate) * up``.

    Args:
        gate, up: (..., features), not empty, at most 32768 features, of one floating dtype.
    """
    gate, up = gate.contiguous(), up.contiguous()
    count, columns = as_rows(gate).shape
    codes = torch.empty(gate.shape, dtype=torch.int8, device=gate.device)
    r = torch.empty((*gate.shape[:-1], 1), dtype=torch.float32, device=gate.device)
    chunk, number, warps = _forward_cut(columns)
    key = (gate.dtype, columns, *aligned(gate, up))
    args = (gate, up, codes, r, columns, chunk, number)
    launch(_swiglu_forward, count, gate.get_device(), key, args, warps)
    return codes, r


def _forward_cut(columns: int) -> tuple[int, int, int]:
    """Elements a chunk, chunks, warps."""
    chunk, number = chunks(columns)
    return chunk, number, max(1, chunk // 256)


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and ``h`` as the forward quantized it: three of gate's shape.

    Args:
        dh: gradient of h, of gate's shape and dtype.
        gate, up: as in the forward.
        r: float32 (..., 1), the forward's scales.
    """
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    columns = gate.shape[-1]
    dgate, dup, h = (torch.empty_like(gate) for _ in range(3))
    block = min(1024, power_of_2(columns))
    blocks = ceil_div(columns, block)
    key = (gate.dtype, columns, *aligned(dh, gate, up))
    args = (dh, gate, up, r, dgate, dup, h, columns, blocks, block)
    launch(_swiglu_backward, r.numel() * blocks, gate.get_device(), key, args, warps=4)
    return dgate, dup, h


def swiglu_gradients(
    dh: Tensor, gate: Tensor, up: Tensor, r_h: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate and up; the int8 codes of h; and the peaks of each gradient: of its tokens, float32
    (tokens,), and of gradient / r of its features, float32 (features,).

    Args:
        dh, gate, up: as in :func:`swiglu_backward`.
        r_h: float32 (..., 1), the forward's scales of h.
        r: float32 (..., 1), those of the x that gate and up read.
    """
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    rows, columns = as_rows(gate).shape
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    h = torch.empty_like(gate, dtype=torch.int8)
    largest, peak = peaks(2 * rows, 2 * columns, gate.device)
    key = (gate.dtype, rows, columns, *aligned(dh, gate, up, peak))
    args = (dh, gate, up, r_h, r, dgate, dup, h, largest, peak, rows, columns, ROWS, BLOCK)
    programs = ceil_div(rows, ROWS) * ceil_div(columns, BLOCK)
    launch(_swiglu_gradients, programs, gate.get_device(), key, args, warps=1)
    of_gate, of_up = largest.view(torch.float32).split(rows)
    gate_peak, up_peak = peak.view(torch.float32).split(columns)
    return dgate, dup, h, of_gate, gate_peak, of_up, up_peak
