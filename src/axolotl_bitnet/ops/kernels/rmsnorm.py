"""RMSNorm that also quantizes what it returns, forward and backward. Twin in
:mod:`axolotl_bitnet.ops.activations`.

The linear layers behind a norm need the codes of its output. They are made here, while the row is in
registers, so it is not read again. y is rounded as the models' own code rounds it (the normalized x to its
dtype, then its product with the weight), and the codes are those of the y that is returned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import (
    EPSILON,
    as_rows,
    cast,
    magnitude,
    power_of_2,
    reciprocal,
    row_codes,
    row_scale,
    triton_dtype,
)
from .launch import aligned, launch


@triton.jit
def _rmsnorm_forward(
    x_ptr, w_ptr, y_ptr, codes_ptr, r_ptr, rstd_ptr, columns, eps, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=mask, other=0.0).to(tl.float32)
    rstd = reciprocal(tl.sqrt_rn(tl.sum(x * x, axis=0) / columns + eps))
    y = cast(cast(x * rstd, dtype).to(tl.float32) * w, dtype)
    seen = cast(y.to(tl.float32), DTYPE).to(tl.float32)
    r = row_scale(tl.max(magnitude(seen), axis=0), EPSILON)
    tl.store(y_ptr + row * columns + column, y, mask=mask)
    tl.store(codes_ptr + row * columns + column, row_codes(seen, r), mask=mask)
    tl.store(r_ptr + row, r)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _rmsnorm_backward(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, dw_ptr, rows, columns, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    mask = column < columns
    w = tl.load(w_ptr + column, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for step in range(tl.program_id(0), rows, PROGRAMS):
        place = tl.cast(step, tl.int64) * columns + column
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + step)
        normal = x * rstd
        weighted = dy * w
        dx = rstd * (weighted - normal * (tl.sum(weighted * normal, axis=0) / columns))
        tl.store(dx_ptr + place, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
        dw += dy * normal
    tl.store(dw_ptr + tl.program_id(0) * columns + column, dw, mask=mask)


def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalized x, its int8 codes and scales ``r`` (of ``y.to(dtype)``), and 1 / rms, float32 (..., 1).

    Args:
        x: (..., features), not empty, at most 32768 features.
        weight: (features,), of x's dtype.
        eps: added to the mean square.
        dtype: what y is rounded to before it is quantized.
    """
    x = x.contiguous()
    count, columns = as_rows(x).shape
    y = torch.empty_like(x)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    r = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(r)
    block = power_of_2(columns)
    args = (x, weight, y, codes, r, rstd, columns, eps, triton_dtype(dtype), block)
    key = (x.dtype, dtype, columns, *aligned(x, weight))
    launch(_rmsnorm_forward, count, x.get_device(), key, args, _warps(block))
    return y, codes, r, rstd


def rmsnorm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight.

    Args:
        dy: of x's shape and dtype.
        x, weight: as in the forward.
        rstd: float32 (..., 1), from the forward.
    """
    dy, x = dy.contiguous(), x.contiguous()
    count, columns = as_rows(x).shape
    dx = torch.empty_like(x)
    block = power_of_2(columns)
    programs = min(count, 528)
    dw = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    key = (x.dtype, count, columns, *aligned(dy, x, weight))
    args = (dy, x, weight, rstd, dx, dw, count, columns, programs, block)
    launch(_rmsnorm_backward, programs, x.get_device(), key, args, _warps(block))
    return dx, dw.sum(0).to(weight.dtype)


def _warps(block: int) -> int:
    return max(1, min(4, block // 512), block // 2048)
