"""Operations on activations: to codes and back, the product with a weight's codes, SwiGLU and RMSNorm with
the quantization that follows them.

Results are contiguous. How an operation is written: :mod:`axolotl_bitnet.ops.operation`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from .. import ternary
from .operation import MAX_COLUMNS, has_kernels, operation


def _fits(x: Tensor, dtype: torch.dtype) -> bool:
    return has_kernels(x, dtype) and x.numel() > 0


def _row_fits(x: Tensor, dtype: torch.dtype) -> bool:
    return has_kernels(x, dtype) and x.numel() > 0 and x.shape[-1] <= MAX_COLUMNS


def _codes_and_r(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@operation(
    "activations",
    lambda x, dtype, floor=0.0: _row_fits(x, dtype),
    lambda x, dtype, floor=0.0: _codes_and_r(x),
)
def quantize_activations(
    x: Tensor, dtype: torch.dtype, floor: float = ternary.EPSILON
) -> tuple[Tensor, Tensor]:
    """int8 codes and scales ``r`` (..., 1) of ``x.to(dtype)``; max|x| counts as ``floor`` at least."""
    codes, r = ternary.quantize_activations(x.to(dtype), floor)
    return codes.contiguous(), r.contiguous()


@operation(
    "activations",
    lambda codes, r, dtype: _fits(codes, dtype),
    lambda codes, r, dtype: codes.new_empty(codes.shape, dtype=dtype),
)
def dequantize_activations(codes: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes / r`` as ``dtype``: what dY^T is multiplied with."""
    return ternary.dequantize(codes, r, dtype)


@operation(
    "matmul",
    lambda codes_x, r, codes_w, s, bias, dtype: _fits(codes_x, dtype) and codes_w.numel(),
    lambda codes_x, r, codes_w, s, bias, dtype: codes_x.new_empty(
        (*codes_x.shape[:-1], codes_w.shape[0]), dtype=dtype
    ),
)
def matmul(
    codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(codes_x . codes_w^T) / (r * s)`` as ``dtype``, plus the bias: (..., out_features)."""
    y = ternary.dequantize_output(ternary.matmul_codes(codes_x, codes_w), r, s).to(dtype)
    return y if bias is None else y + bias.to(dtype)


@operation(
    "matmul",
    lambda codes_x, r, codes_w, s, onto: (
        has_kernels(codes_x, onto.dtype) and codes_x.numel() and codes_w.numel() and onto.is_contiguous()
    ),
    lambda codes_x, r, codes_w, s, onto: onto.new_empty(onto.shape),
)
def matmul_onto(codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor, onto: Tensor) -> Tensor:
    """``onto`` plus :func:`matmul` in its dtype: (..., out_features)."""
    return (onto + matmul.plain(codes_x, r, codes_w, s, None, onto.dtype)).contiguous()


@operation("swiglu", lambda gate, up: _row_fits(gate, gate.dtype), lambda gate, up: _codes_and_r(gate))
def swiglu_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and scales ``r`` of ``silu(gate) * up``, rounded as a model's own code rounds it."""
    return quantize_activations.plain(silu(gate) * up, gate.dtype)


@operation(
    "swiglu",
    lambda dh, gate, up, r: _fits(gate, gate.dtype),
    lambda dh, gate, up, r: tuple(gate.new_empty(gate.shape) for _ in range(3)),
)
def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and ``silu(gate) * up`` as it was quantized."""
    activated = silu(gate)
    codes = torch.nan_to_num((activated * up).to(torch.float32) * r, nan=0.0).round_()
    gate32 = gate.to(torch.float32)
    sigmoid = torch.sigmoid(gate32)
    dgate = dh.to(torch.float32) * up * sigmoid * (1 + gate32 * (1 - sigmoid))
    dup = dh.to(torch.float32) * activated
    h = ternary.dequantize(codes, r, gate.dtype)
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous(), h.contiguous()


@operation(
    "rmsnorm",
    lambda x, weight, eps, dtype: _row_fits(x, x.dtype),
    lambda x, weight, eps, dtype: (
        x.new_empty(x.shape),
        *_codes_and_r(x),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    ),
)
def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, its int8 codes and scales ``r`` (of ``y.to(dtype)``), and 1 / rms, float32 (..., 1)."""
    x32 = x.to(torch.float32)
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    y = ((x32 * rstd).to(x.dtype) * weight).contiguous()
    return y, *quantize_activations.plain(y, dtype), rstd.contiguous()


@operation(
    "rmsnorm",
    lambda dy, x, weight, rstd: _row_fits(x, x.dtype),
    lambda dy, x, weight, rstd: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
def rmsnorm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the norm's weight."""
    normal = x.to(torch.float32) * rstd
    weighted = dy.to(torch.float32) * weight
    dx = rstd * (weighted - normal * (weighted * normal).mean(-1, keepdim=True))
    dw = (dy.to(torch.float32) * normal).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dw.to(weight.dtype)
