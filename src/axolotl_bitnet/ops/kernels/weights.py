"""Weights to ternary codes. Twins in :mod:`axolotl_bitnet.ops.weights`.

Two launches and no host sync: the first writes one float64 sum of |W| per program, and in the second every
program adds those up and so has the scale. The second goes through the matrix from its end, which the first
has just read: what the L2 cache still holds is not read again from memory.

The backward makes ``codes / s`` in one launch, from the latents and the ``g`` that the forward kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import EPSILON, INFINITY, cast, ceil_div, reciprocal
from .launch import aligned, launch

_PROGRAMS = 512
_BLOCK = 16384  # bytes
_TILE = 64


@triton.jit
def _abs_sums(w_ptr, sums_ptr, numel, blocks, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float64)
    for block in range(program, blocks, PROGRAMS):
        offset = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + offset, mask=offset < numel, other=0.0).to(tl.float32)
        sums += tl.abs(cast(w, tl.bfloat16).to(tl.float32)).to(tl.float64)
    tl.store(sums_ptr + program, tl.sum(sums, axis=0))


@triton.jit
def ternary_codes(w, inverse_g):
    """-1, 0 or 1, float32: clamp(round(w * inverse_g), -1, 1), half to even; 0 for NaN."""
    scaled = cast(w.to(tl.float32), tl.bfloat16).to(tl.float32) * inverse_g
    return tl.where(scaled > 0.5, 1.0, tl.where(scaled < -0.5, -1.0, 0.0))


@triton.jit
def scale(g):
    """``s`` = bf16(1 / bf16(g)), bfloat16."""
    return cast(reciprocal(cast(g, tl.bfloat16).to(tl.float32)), tl.bfloat16)


@triton.jit
def _codes(
    w_ptr, sums_ptr, codes_ptr, s_ptr, g_ptr, numel, blocks, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    total = tl.sum(tl.load(sums_ptr + tl.arange(0, PROGRAMS)), axis=0)
    mean = (total / tl.cast(numel, tl.float64)).to(tl.float32)
    g = tl.where(mean < INFINITY, tl.maximum(mean, EPSILON), float("nan"))
    inverse_g = reciprocal(g)
    if program == 0:
        tl.store(g_ptr, g)
        tl.store(s_ptr, scale(g))
    for step in range(program, blocks, PROGRAMS):
        offset = tl.cast(blocks - 1 - step, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offset < numel
        codes = ternary_codes(tl.load(w_ptr + offset, mask=mask, other=0.0), inverse_g)
        tl.store(codes_ptr + offset, codes.to(tl.int8), mask=mask)


@triton.jit
def _dequantized(w_ptr, g_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    g = tl.load(g_ptr)
    codes = ternary_codes(tl.load(w_ptr + offset, mask=mask, other=0.0), reciprocal(g))
    out = codes * reciprocal(scale(g).to(tl.float32))  # a code is 0 or +-1: this is the division, to the bit
    tl.store(out_ptr + offset, cast(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _transposed(w_ptr, g_ptr, out_ptr, s_ptr, rows, columns, TILE: tl.constexpr):
    across = tl.cdiv(columns, TILE)
    row = (tl.program_id(0) // across) * TILE + tl.arange(0, TILE)
    column = (tl.program_id(0) % across) * TILE + tl.arange(0, TILE)
    g = tl.load(g_ptr)
    inverse_g = reciprocal(g)
    if tl.program_id(0) == 0:
        tl.store(s_ptr, scale(g))
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    w = tl.load(w_ptr + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0.0)
    codes = tl.trans(ternary_codes(w, inverse_g).to(tl.int8))
    place = out_ptr + column[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(place, codes, mask=(column < columns)[:, None] & (row < rows)[None, :])


def abs_sum_parts(weight: Tensor) -> Tensor:
    """float64 (512,) that add up to ``sum|bf16(W)|``. The weight may be empty."""
    weight = weight.contiguous()
    sums = torch.empty(_PROGRAMS, dtype=torch.float64, device=weight.device)
    numel, block = weight.numel(), _BLOCK // weight.itemsize
    key = (weight.dtype, numel, *aligned(weight))
    args = (weight, sums, numel, ceil_div(numel, block), _PROGRAMS, block)
    launch(_abs_sums, _PROGRAMS, weight.get_device(), key, args, warps=8)
    return sums


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 of the weight's shape, ``s`` bfloat16 (1,) and ``g`` float32 ().

    Args:
        weight: latents, not empty, floating point.
    """
    weight = weight.contiguous()
    numel, device = weight.numel(), weight.device
    sums = abs_sum_parts(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=device)
    s = torch.empty(1, dtype=torch.bfloat16, device=device)
    g = torch.empty((), dtype=torch.float32, device=device)
    block = _BLOCK // weight.itemsize
    blocks = ceil_div(numel, block)
    key = (weight.dtype, numel, *aligned(weight))
    cut = (numel, blocks, _PROGRAMS, block)
    launch(_codes, _PROGRAMS, weight.get_device(), key, (weight, sums, codes, s, g, *cut), warps=8)
    return codes, s, g


def dequantized_weight(weight: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes / s`` as ``dtype``, of the weight's shape.

    Args:
        weight: latents, floating point.
        g: their absmean, from :func:`ternarize`.
    """
    weight = weight.contiguous()
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    numel, block = weight.numel(), 4096
    key = (weight.dtype, dtype, numel, *aligned(weight))
    args = (weight, g, out, numel, block)
    launch(_dequantized, ceil_div(numel, block), weight.get_device(), key, args, warps=8)
    return out


def transposed_codes(weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The codes as int8 (columns, rows), for a product over the rows, which int8 tensor cores need last; and
    ``s`` bfloat16 (1,).

    Args:
        weight: latents (rows, columns), floating point.
        g: their absmean, from :func:`ternarize`.
    """
    weight = weight.contiguous()
    rows, columns = weight.shape
    out = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
    s = torch.empty(1, dtype=torch.bfloat16, device=weight.device)
    key = (weight.dtype, rows, columns, *aligned(weight))
    args = (weight, g, out, s, rows, columns, _TILE)
    programs = ceil_div(rows, _TILE) * ceil_div(columns, _TILE)
    launch(_transposed, programs, weight.get_device(), key, args, warps=4)
    return out, s
