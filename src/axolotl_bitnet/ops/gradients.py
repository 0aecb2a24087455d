"""Operations of an 8-bit backward: gradients to int8, scaled along the features or along the tokens, and the
product that sums over the tokens.

The weight's gradient is ``dW[o, i] = sum over tokens t of z[t, o] codes_x[t, i]`` with ``z[t, o] = dY[t, o] /
r[t]``. The codes of x are exact in int8, so z alone loses. It is quantized with a scale per output::

    peak[o]  = max(max over t of |z[t, o]|, 1e-30)
    c[o]     = 127 * (1 / peak[o])
    codes    = floor(z c + u), within -127 and 127

u is in [0, 1), so that the mean of a code is ``z c`` itself: rounded to nearest, a column with one large
element would lose all its small ones. u is no random number but a hash of the element's bits and place: the
same tensors give the same gradient, in a resumed run and in a layer that is computed twice.

int8 tensor cores want both operands contiguous along the sum, so the operands are made transposed. Their rows
end with zeros up to a multiple of 16 tokens.

How an operation is written: :mod:`axolotl_bitnet.ops.operation`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from .. import ternary
from .activations import swiglu_backward
from .operation import has_kernels, operation

GRADIENT_FLOOR = 1e-30
"""Of the scale of gradients: those of a mean over many tokens lie far below the floor of activations."""

MOST_TOKENS = (2**31 - 1) // 127**2 // 16 * 16
"""Products of two int8 codes that a sum in int32 holds."""

ROW_HASH, COLUMN_HASH, HASH = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D  # odd; from 2**32 / golden ratio, and xxHash


def padded(tokens: int) -> int:
    """The next multiple of 16, to which TMA aligns a row of bytes."""
    return -(-tokens // 16) * 16


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _fits(x: Tensor, *_: object) -> bool:
    return has_kernels(x, torch.bfloat16 if x.dtype == torch.int8 else x.dtype) and x.numel() > 0


def _new_peaks(dy: Tensor) -> tuple[Tensor, Tensor]:
    float32 = torch.float32
    return dy.new_empty(_tokens(dy), dtype=float32), dy.new_empty(dy.shape[-1], dtype=float32)


@operation("gradients", lambda dy, r: _fits(dy), lambda dy, r: _new_peaks(dy))
def gradient_peaks(dy: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """What the scales follow from, float32: the largest |dY| of each token, (tokens,), and the largest |z| of
    each output, (out_features,); at least 1e-30, and NaN or Inf where there is one.

    Args:
        dy: (..., out_features).
        r: float32 (..., 1), the scales of x.
    """
    z = _z(dy, r)
    rows = dy.reshape(z.shape).to(torch.float32)
    return _largest(rows, 1), _largest(z, 0)


@operation(
    "gradients",
    lambda dy, *_: _fits(dy),
    lambda dy, r, largest, peak: (
        dy.new_empty(dy.shape, dtype=torch.int8),
        dy.new_empty((*dy.shape[:-1], 1), dtype=torch.float32),
        dy.new_empty((dy.shape[-1], padded(_tokens(dy))), dtype=torch.int8),
        dy.new_empty((dy.shape[-1], 1), dtype=torch.float32),
    ),
)
def quantize_gradient(
    dy: Tensor, r: Tensor, largest: Tensor, peak: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int8 codes of dY and their scales (..., 1), as of activations; int8 codes of z, (out_features, tokens
    and padding), and ``c``, float32 (out_features, 1). Codes 0 and the scale NaN where there is a NaN or Inf.

    Args:
        dy, r: as of :func:`gradient_peaks`.
        largest, peak: what that gave.
    """
    codes, scale = ternary.quantize_activations(dy, GRADIENT_FLOOR)
    peak = torch.where(torch.isfinite(peak), peak, torch.nan)
    z, c = _z(dy, r), peak.reciprocal() * 127
    bits = z.view(torch.int32).to(torch.int64)
    tokens, features = (torch.arange(n, device=z.device) for n in z.shape)
    mixed = (bits ^ (tokens * ROW_HASH)[:, None] ^ features * COLUMN_HASH) & 0xFFFFFFFF
    u = ((mixed * HASH & 0xFFFFFFFF) >> 16).to(torch.float32) / 65536
    codes_z = torch.nan_to_num(z * c + u, nan=0.0).floor_().clamp_(-127, 127).to(torch.int8)
    return codes.contiguous(), scale.contiguous(), _transposed(codes_z), c[:, None]


@operation(
    "gradients",
    _fits,
    lambda codes: codes.new_empty((codes.shape[-1], padded(_tokens(codes)))),
)
def transposed_activations(codes: Tensor) -> Tensor:
    """int8 codes (in_features, tokens and padding) of codes (..., in_features)."""
    return _transposed(codes.reshape(-1, codes.shape[-1]))


@operation(
    "swiglu",
    lambda dh, gate, up, r_h, r: _fits(gate),
    lambda dh, gate, up, r_h, r: (
        gate.new_empty(gate.shape),
        gate.new_empty(gate.shape),
        gate.new_empty(gate.shape, dtype=torch.int8),
        *_new_peaks(gate),
        *_new_peaks(gate),
    ),
)
def swiglu_gradients(
    dh: Tensor, gate: Tensor, up: Tensor, r_h: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`axolotl_bitnet.ops.swiglu_backward` for an 8-bit backward: gradients of gate and up, the int8
    codes of ``silu(gate) * up``, and :func:`gradient_peaks` of the two gradients.

    Args:
        dh, gate, up: (..., features).
        r_h: float32 (..., 1), scales of ``silu(gate) * up``.
        r: float32 (..., 1), scales of the x that gate and up read.
    """
    dgate, dup, _ = swiglu_backward.plain(dh, gate, up, r_h)
    h = torch.nan_to_num((silu(gate) * up).to(torch.float32) * r_h, nan=0.0).round_().to(torch.int8)
    of_gate, of_up = (gradient_peaks.plain(each, r) for each in (dgate, dup))
    return dgate, dup, h.contiguous(), *of_gate, *of_up


@operation(
    "matmul",
    lambda codes_z, c, codes_x, dtype: has_kernels(codes_z, dtype) and codes_z.numel() and codes_x.numel(),
    lambda codes_z, c, codes_x, dtype: codes_z.new_empty((codes_z.shape[0], codes_x.shape[0]), dtype=dtype),
)
def weight_product(codes_z: Tensor, c: Tensor, codes_x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(codes_z . codes_x^T) / c`` as ``dtype``: (out_features, in_features).

    Args:
        codes_z, c: what :func:`quantize_gradient` gave; at most ``MOST_TOKENS`` tokens.
        codes_x: int8 (in_features, tokens and padding).
    """
    product = codes_z.to(torch.float64) @ codes_x.to(torch.float64).t()  # exact, as integers are in int32
    return (product.to(torch.float32) / c).to(dtype)


def _z(dy: Tensor, r: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).to(torch.float32) * r.reshape(-1, 1).reciprocal()


def _largest(x: Tensor, dim: int) -> Tensor:
    largest = x.abs().amax(dim) if x.numel() else x.new_zeros(x.shape[1 - dim])
    return largest.clamp(min=GRADIENT_FLOOR)


def _transposed(codes: Tensor) -> Tensor:
    tokens, features = codes.shape
    out = codes.new_zeros(features, padded(tokens))
    out[:, :tokens] = codes.t()
    return out
