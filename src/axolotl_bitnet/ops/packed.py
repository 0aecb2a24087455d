"""The product with weights that are stored as 2 bits: what packed models run on."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ternary
from .operation import MAX_COLUMNS, has_kernels, operation
from .weights import ROWS_PER_BYTE, unpack_codes


@operation(
    "decode",
    lambda x, weight, s, sizes, bias, dtype: (
        has_kernels(x, dtype) and weight.dtype == torch.uint8 and x.numel() and x.shape[-1] <= MAX_COLUMNS
    ),
    lambda x, weight, s, sizes, bias, dtype: x.new_empty((*x.shape[:-1], sum(sizes)), dtype=dtype),
)
def packed_matmul(
    x: Tensor, weight: Tensor, s: Tensor, sizes: list[int], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """BitLinear's output for x, from one or several matrices that read the same x: (..., rows) as ``dtype``.

    Args:
        x: (..., K), floating point; rounded to ``dtype`` first.
        weight: the bytes of each matrix (its rows / 4, K), uint8, as :func:`pack_codes` makes them, one
            matrix below the other; or their codes, int8 (rows, K): four times the memory, and no unpacking.
        s: float32 (matrices,), by which a matrix's product is divided.
        sizes: rows of each matrix, multiples of 4.
        bias: (rows,) or None.
        dtype: of the result.
    """
    codes, r = ternary.quantize_activations(x.to(dtype))
    stored = weight.dtype == torch.uint8
    found = []
    for part, scale in zip(
        weight.split([size // ROWS_PER_BYTE for size in sizes] if stored else sizes), s, strict=True
    ):
        product = ternary.matmul_codes(codes, unpack_codes(part) if stored else part)
        found.append(ternary.dequantize_output(product, r, scale).to(dtype))
    y = torch.cat(found, dim=-1)
    return y if bias is None else y + bias.to(dtype)
