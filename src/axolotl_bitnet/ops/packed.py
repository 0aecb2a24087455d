"""The product with weights that are stored as 2 bits: what packed models are run with."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ternary
from .operations import MAX_COLUMNS, has_kernels, register, run
from .plain import ROWS_PER_BYTE, unpack_codes


def packed_matmul(
    x: Tensor, weight: Tensor, s: Tensor, sizes: list[int], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """BitLinear's output for x, from one or several matrices that read the same x: (..., out_features) as ``dtype``.

    Args:
        x: (..., K), floating point; rounded to ``dtype`` first.
        weight: the bytes of each matrix (its rows / 4, K), uint8, one matrix below the other; or their codes, int8
            (rows, K), which take four times the memory and save the unpacking.
        s: float32 (matrices,), by which a matrix's product is divided.
        sizes: rows of each matrix, multiples of 4.
        bias: (out_features,) or None.
        dtype: of the result.
    """
    return run(_packed_matmul, _packed_matmul_here, x, weight, s, sizes, bias, dtype)


def plain_packed_matmul(
    x: Tensor, weight: Tensor, s: Tensor, sizes: list[int], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    codes, r = ternary.quantize_activations(x.to(dtype))
    stored = weight.dtype == torch.uint8
    rows = [size // ROWS_PER_BYTE for size in sizes] if stored else sizes
    found = []
    for part, scale in zip(weight.split(rows), s, strict=True):
        product = ternary.matmul_codes(codes, unpack_codes(part) if stored else part)
        found.append(ternary.dequantize_output(product, r, scale).to(dtype))
    y = torch.cat(found, dim=-1)
    return y if bias is None else y + bias.to(dtype)


def _packed_matmul_here(
    x: Tensor, weight: Tensor, s: Tensor, sizes: list[int], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if has_kernels(x, dtype) and weight.dtype == torch.uint8 and x.numel() and x.shape[-1] <= MAX_COLUMNS:
        from .kernels import decode

        return decode.packed_matmul(x, weight, s, sizes, bias, dtype)
    return plain_packed_matmul(x, weight, s, sizes, bias, dtype)


_packed_matmul = register(
    _packed_matmul_here,
    lambda x, weight, s, sizes, bias, dtype: x.new_empty((*x.shape[:-1], sum(sizes)), dtype=dtype),
)
