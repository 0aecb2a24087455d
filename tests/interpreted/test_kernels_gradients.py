"""kernels/gradients.py against the operations in plain torch, to the bit; the product of two codes."""

from __future__ import annotations

import math

import pytest
import torch

from axolotl_bitnet import ops
from axolotl_bitnet.ops.kernels import gradients as kernel
from axolotl_bitnet.ops.kernels import matmul
from support.kernel_cases import DTYPES, activations, all_same, same

SLOW = {"large chunks", "many chunks"}  # in the interpreter; rows of more tiles are of no other kind
CASES = [(name, dtype) for name in activations() if name not in SLOW for dtype in DTYPES]
CASES.append(("many chunks", torch.bfloat16))


def scales(dy: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dy.numel())
    return torch.rand((*dy.shape[:-1], 1), generator=generator) * 1000 + 0.1


@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_codes_along_rows_and_columns(name: str, dtype: torch.dtype) -> None:
    dy = activations()[name].to(dtype)
    r = scales(dy)
    peaks = kernel.gradient_peaks(dy, r)
    all_same(peaks, ops.gradient_peaks.plain(dy, r))
    codes, *rest = kernel.quantize_gradient(dy, r, *peaks)
    all_same((codes, *rest), ops.quantize_gradient.plain(dy, r, *peaks))
    same(kernel.transposed_activations(codes), ops.transposed_activations.plain(codes))


@pytest.mark.parametrize("rows, columns", [(1, 4), (127, 70), (128, 64), (257, 129), (600, 3)])
def test_more_rows_than_a_program_or_a_tile_takes(rows: int, columns: int) -> None:
    dy = torch.randn(rows, columns) * torch.logspace(-9, -3, rows)[:, None]
    dy[:, 0] = 0
    r = scales(dy)
    peaks = kernel.gradient_peaks(dy, r)
    all_same(peaks, ops.gradient_peaks.plain(dy, r))
    found = kernel.quantize_gradient(dy, r, *peaks)
    all_same(found, ops.quantize_gradient.plain(dy, r, *peaks))
    codes = found[2]
    assert codes.shape == (columns, -(-rows // 16) * 16)
    assert not codes[0].any() and not codes[:, rows:].any() and codes[1:, :rows].any(1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_poison_stays_in_its_column_and_its_row(bad: float) -> None:
    dy = torch.randn(40, 33)
    dy[7, 5] = bad
    r = scales(dy)
    codes, scale, codes_z, c = kernel.quantize_gradient(dy, r, *kernel.gradient_peaks(dy, r))
    assert scale.isnan().nonzero()[:, 0].tolist() == [7] and not codes[7].any()
    assert c.isnan().nonzero()[:, 0].tolist() == [5] and not codes_z[5].any()
    r[3] = bad  # a poisoned x reaches every weight
    peaks = kernel.gradient_peaks(dy, r)
    all_same(kernel.quantize_gradient(dy, r, *peaks), ops.quantize_gradient.plain(dy, r, *peaks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "out, tokens, columns", [(1, 16, 1), (48, 32, 80), (33, 1040, 64), (17, 48, 9), (150, 272, 600)]
)
def test_product(out: int, tokens: int, columns: int, dtype: torch.dtype) -> None:
    """Through TMA where the shape allows it, and through pointers; the extremes of int8 among the codes."""
    z = torch.randint(-127, 128, (out, tokens), dtype=torch.int8)
    x = torch.randint(-127, 128, (columns, tokens), dtype=torch.int8)
    z[0], x[0] = 127, -127
    c = torch.rand(out, 1) * 1e9 + 1e3
    found = matmul.weight_product(z, c, x, dtype)
    same(found, ops.weight_product.plain(z, c, x, dtype))
    same(found, ((z.long() @ x.long().t()).float() / c).to(dtype))


def test_all_tokens_that_int32_holds() -> None:
    """And one multiple of 16 more overflows."""
    most = ops.MOST_TOKENS
    assert most * 127**2 < 2**31 <= (most + 16) * 127**2
    z = torch.full((1, most), 127, dtype=torch.int8)
    c = torch.ones(1, 1)
    assert matmul.weight_product(z, c, z, torch.float32).item() == float(torch.tensor(most * 127.0**2))
    z = torch.full((1, most + 16), 127, dtype=torch.int8)
    assert matmul.weight_product(z, c, z, torch.float32).item() < 0
