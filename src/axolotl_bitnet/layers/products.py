"""The two products of a layer's backward, in the precision that it asks for.

``bf16`` multiplies dY with ``codes / s`` and ``codes / r``, in dY's dtype. ``int8_dx`` quantizes dY with a
scale per token, as activations are, and multiplies the codes; the weight is exact in int8. ``int8`` computes
dW so too: it quantizes ``dY / r`` with a scale per output, rounded stochastically, and the codes of x are
exact in int8 (:mod:`axolotl_bitnet.ops.gradients`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from .weight_codes import Weight, dequantized_weight, transposed_codes

Backward = Literal["bf16", "int8_dx", "int8"]
"""Which products of the backward are 8-bit: none (dY's own dtype, bf16 as a rule), that of dX, or both."""


class Inputs:
    """x as the weights' gradients need it, made once for the layers that read it.

    Args:
        codes, r: int8 (..., in_features) and float32 (..., 1).
        dense: ``codes / r`` (..., in_features), where it has been made; then neither of them is needed.
    """

    def __init__(
        self, codes: Tensor | None = None, r: Tensor | None = None, dense: Tensor | None = None
    ) -> None:
        self.codes, self.r, self._dense = codes, r, dense
        self._transposed: Tensor | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """``codes / r`` as ``dtype``."""
        if self._dense is None:
            assert self.codes is not None and self.r is not None
            self._dense = ops.dequantize_activations(self.codes, self.r, dtype)
        return self._dense

    def transposed(self) -> Tensor:
        """int8 (in_features, tokens and padding)."""
        if self._transposed is None:
            assert self.codes is not None
            self._transposed = ops.transposed_activations(self.codes)
        return self._transposed


class OutputGradient:
    """dY of a layer, and the gradients that follow from it; quantized once for both.

    Args:
        dy: (..., out_features).
        r: float32 (..., 1), the scales of the layer's x.
        precision: of the products, a :data:`Backward`.
        peaks: :func:`axolotl_bitnet.ops.gradient_peaks`, where they are known.
    """

    def __init__(self, dy: Tensor, r: Tensor, precision: str, peaks: Sequence[Tensor] = ()) -> None:
        self.dy, self.precision = dy, precision
        if precision == "int8":
            largest, peak = peaks or ops.gradient_peaks(dy, r)
            self.codes, self.scale, self.codes_z, self.c = ops.quantize_gradient(dy, r, largest, peak)

    def of_input(self, weight: Weight, g: Tensor, onto: Tensor | None = None) -> Tensor:
        """``dY . (codes_w / s)``, (..., in_features) in dY's dtype; added to ``onto``, if there is one, which
        may be overwritten."""
        dy = self.dy
        if self.precision != "bf16":
            if self.precision == "int8":
                codes, scale = self.codes, self.scale
            else:
                codes, scale = ops.quantize_activations(dy, dy.dtype, ops.GRADIENT_FLOOR)
            operands = (codes, scale, *transposed_codes(weight, g))
            return ops.matmul(*operands, None, dy.dtype) if onto is None else ops.matmul_onto(*operands, onto)
        dense = dequantized_weight(weight, g, dy.dtype)
        if onto is None:
            return dy @ dense
        onto.view(-1, onto.shape[-1]).addmm_(dy.reshape(-1, dy.shape[-1]), dense)  # one launch, one rounding
        return onto

    def of_weight(self, inputs: Inputs, dtype: torch.dtype) -> Tensor:
        """``dY^T . (codes_x / r)`` summed over tokens, (out_features, in_features) as ``dtype``."""
        if self.precision != "int8":
            return weight_gradient(self.dy, inputs.dense(self.dy.dtype), dtype)
        return _weight_product(self.codes_z, self.c, inputs.transposed(), dtype)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``dY^T . x`` summed over tokens, (out_features, in_features) as ``dtype``."""
    rows = dy.reshape(-1, dy.shape[-1]).t()
    x = x.reshape(-1, x.shape[-1])
    if x.is_cuda and dtype == torch.float32 and x.dtype != dtype:
        return torch.mm(rows, x, out_dtype=dtype)  # the accumulator as it is: no rounding, and no cast
    return (rows @ x).to(dtype)


def _weight_product(codes_z: Tensor, c: Tensor, codes_x: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`axolotl_bitnet.ops.weight_product`, in parts where int32 could not hold the sum."""
    most = ops.MOST_TOKENS
    if codes_z.shape[1] <= most:
        return ops.weight_product(codes_z, c, codes_x, dtype)
    parts = zip(codes_z.split(most, 1), codes_x.split(most, 1), strict=True)
    products = [ops.weight_product(z.contiguous(), c, x.contiguous(), torch.float32) for z, x in parts]
    return torch.stack(products).sum(0).to(dtype)
