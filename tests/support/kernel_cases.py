"""What the tests of this folder share: awkward tensors, and equality to the bit.

The folder runs in Triton's interpreter, in a process of its own that ``tests/test_kernels.py`` starts. By
hand: ``TRITON_INTERPRET=1 pytest tests/interpreted``.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from axolotl_bitnet import ternary
from axolotl_bitnet.ops import pack_codes

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("tests/test_kernels.py runs this in Triton's interpreter", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def activations() -> dict[str, Tensor]:
    """float32 rows of every shape, layout and temper."""
    generator = torch.Generator().manual_seed(17)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    poisoned, outliers, zeros = randn(7, 40), randn(5, 129), randn(4, 33)
    poisoned[1, 5], poisoned[2, 0], poisoned[4, 39], poisoned[5] = math.nan, math.inf, -math.inf, math.nan
    poisoned[5, 3] = math.inf
    outliers[0, 7], outliers[3, 128] = 3e4, -6e4
    zeros[0], zeros[2] = 0, -0.0
    halves = torch.arange(-63.5, 64, 0.5).repeat(3, 1)
    halves[:, 0] = torch.tensor([127.0, -127.0, 127.0 / 128])
    halves[2, 1:] /= 128
    return {
        "one element": randn(1, 1),
        "one column": randn(5, 1),
        "one row": randn(1, 130),
        "rank 1": randn(200),
        "rank 3": randn(2, 3, 17),
        "rank 4": randn(2, 1, 3, 33),
        "3 rows": randn(3, 127),
        "31 rows": randn(31, 12),
        "a power of two": randn(5, 64),
        "transposed": randn(40, 7).t(),
        "permuted": randn(20, 3, 4).permute(2, 1, 0),
        "sliced": randn(9, 80)[1::2, 3:77:2],
        "expanded rows": randn(1, 50).expand(4, 50),
        "expanded columns": randn(4, 1).expand(4, 50),
        "middle of rank 3": randn(3, 5, 24)[:, 1:3],
        "just over a chunk": randn(3, 1025),
        "two chunks": randn(2, 2048),
        "many chunks": randn(2, 5000),
        "large chunks": randn(1, 17001),
        "poisoned": poisoned,
        "zero rows": zeros,
        "halves": halves,
        "outliers": outliers,
        "tiny": randn(40, 24) * torch.logspace(-12, -3, 40)[:, None],
        "denormal": randn(3, 24) * 1e-40,
        "huge": randn(3, 24) * 5e37,
    }


def mild_activations() -> dict[str, Tensor]:
    """Those that squares and gradients take without overflow, underflow or poison."""
    wild = {"poisoned", "huge", "outliers", "denormal"}
    return {name: x for name, x in activations().items() if name not in wild}


by_name = pytest.mark.parametrize("name", activations())
by_mild_name = pytest.mark.parametrize("name", mild_activations())


def same(found: Tensor, expected: Tensor) -> None:
    """Equal in dtype, shape and every value, NaN where it is NaN; and contiguous."""
    assert found.dtype == expected.dtype and found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def all_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        same(one, other)


def last_bits(found: Tensor, expected: Tensor) -> int:
    """How many elements differ: each by the last bit, or the test fails. NaN is NaN."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    size = {2: torch.int16, 4: torch.int32}[found.itemsize]
    distance = (found.view(size).long() - expected.contiguous().view(size).long()).abs()
    same = (found == expected) | (found.isnan() & expected.isnan())
    assert (same | (distance <= 1)).all()
    return int((~same).sum())


def matrices(sizes: list[int], columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, bytes and scales of random matrices, one below the other."""
    codes = [torch.randint(-1, 2, (size, columns), dtype=torch.int8) for size in sizes]
    s = torch.rand(len(sizes)) * 90 + 0.3
    return torch.cat(codes), torch.cat([pack_codes(matrix) for matrix in codes]), s


def expected(
    x: Tensor, codes: Tensor, s: Tensor, sizes: list[int], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """From the definition alone, a matrix after the other."""
    codes_x, r = ternary.quantize_activations(x.to(dtype))
    parts = [
        ternary.dequantize_output(ternary.matmul_codes(codes_x, part), r, scale).to(dtype)
        for part, scale in zip(codes.split(sizes), s, strict=True)
    ]
    y = torch.cat(parts, dim=-1)
    return y if bias is None else y + bias.to(dtype)
