"""Arithmetic that rounds as the definition does, on a GPU and in Triton's interpreter.

A plain ``/`` is approximate in Triton, a multiplication and an addition may be fused into one rounding
(every launch of ours sets ``enable_fp_fusion=False``), and the interpreter truncates where it should round to
bfloat16 and has no ``rint``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ... import ternary

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
EPSILON = tl.constexpr(ternary.EPSILON)
INFINITY = tl.constexpr(float("inf"))
_TO_INTEGER = tl.constexpr(1.5 * 2**23)  # floats this large have no fraction: adding it rounds half to even
_TO_INTEGER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def reciprocal(x):
    """1 / x, correctly rounded."""
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def round_even(x):
    """Half to even, for |x| < 2**22."""
    return (x + _TO_INTEGER) - _TO_INTEGER


@triton.jit
def floor(x):
    """The largest integer <= x, int32, for |x| < 2**22: ``tl.floor`` and a conversion each run at an eighth
    of an addition's rate."""
    if INTERPRET:
        return tl.floor(x).to(tl.int32)
    shift = tl.full(x.shape, _TO_INTEGER, tl.float32)
    shifted = tl.inline_asm_elementwise("add.rm.f32 $0, $1, $2;", "=f,f,f", [x, shift], tl.float32, True, 1)
    return shifted.to(tl.int32, bitcast=True) - _TO_INTEGER_BITS


@triton.jit
def fraction(bits):
    """The highest 16 of 32 bits, uint32, as a float in [0, 1): in the mantissa of 1 + x."""
    return (((bits >> 9) & 0x7FFF80) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 to ``dtype``, half to even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(tl.abs(x) < INFINITY, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def exp(x):
    """e**x as torch computes it on the GPU (``tl.exp`` there is an approximation)."""
    if INTERPRET:
        return tl.exp(x)
    return libdevice.exp(x)


@triton.jit
def divide(x, y):
    """x / y, correctly rounded while neither y nor the quotient leaves the normal range; 1 <= y <= 2**100.

    The steps of the IEEE division (Markstein 1990) without its branch for the other cases, which would keep
    the elements of a thread from overlapping.
    """
    if INTERPRET:
        return tl.div_rn(x, y)
    inverse = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], tl.float32, True, 1)
    inverse = tl.fma(tl.fma(-y, inverse, 1.0), inverse, inverse)
    quotient = x * inverse
    quotient = tl.fma(tl.fma(-y, quotient, x), inverse, quotient)
    return tl.fma(tl.fma(-y, quotient, x), inverse, quotient)


@triton.jit
def magnitude(x):
    """|x| of float32 as its bits, int32: ordered as the numbers are, with Inf and then NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_scale(a, floor):
    """``r`` of a row with a the largest of its magnitudes, and ``floor`` at least; NaN if the row holds a
    NaN or an Inf."""
    a = a.to(tl.float32, bitcast=True)
    r = reciprocal(tl.maximum(a, floor)) * 127.0
    return tl.where(a < INFINITY, r, float("nan"))


@triton.jit
def row_codes(x, r):
    """int8 codes of a row's float32 elements: round(x * r), half to even; 0 where r is NaN."""
    shifted = (x * r + _TO_INTEGER).to(tl.int32, bitcast=True)  # the integer is in its lowest bits
    return tl.where(r == r, shifted, 0).to(tl.int8)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own goes through a wrapper that costs as much as a launch.)"""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next one, n itself included."""
    return 1 << (n - 1).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """x as a matrix (rows, last dimension), without a copy where its strides allow that."""
    if x.dim() == 2:
        return x
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of float32, bfloat16 or float16."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
