"""The definition as operations that torch.compile takes whole.

A compiler fuses what it can see into, and drops the roundings to bfloat16 in between: the codes would no
longer be the definition's. So under torch.compile the steps are opaque custom operations
(``torch.ops.axolotl_bitnet.*``), and there is no graph break; in eager mode they are plain calls, without the
cost of the dispatcher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ternary


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`axolotl_bitnet.ternary.ternarize`, whole under torch.compile."""
    return _ternarize(weight) if torch.compiler.is_compiling() else ternary.ternarize(weight)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`axolotl_bitnet.ternary.quantize_activations`, whole under torch.compile."""
    return _quantize_activations(x) if torch.compiler.is_compiling() else ternary.quantize_activations(x)


def matmul(codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """``(codes_x . codes_w^T) / (r * s)`` as ``dtype``, (..., out_features)."""
    call = _matmul if torch.compiler.is_compiling() else _matmul_eager
    return call(codes_x, r, codes_w, s, dtype)


def _matmul_eager(codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    return ternary.dequantize_output(ternary.matmul_codes(codes_x, codes_w), r, s).to(dtype)


_ternarize = torch.library.custom_op("axolotl_bitnet::ternarize", ternary.ternarize, mutates_args=())
_quantize_activations = torch.library.custom_op(
    "axolotl_bitnet::quantize_activations", ternary.quantize_activations, mutates_args=()
)
_matmul = torch.library.custom_op("axolotl_bitnet::matmul", _matmul_eager, mutates_args=())


@_ternarize.register_fake
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=torch.int8), weight.new_empty(1, dtype=torch.bfloat16)


@_quantize_activations.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@_matmul.register_fake
def _(codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    return codes_x.new_empty((*codes_x.shape[:-1], codes_w.shape[0]), dtype=dtype)
