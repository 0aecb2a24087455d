"""Products of packed weights, against the definition: on every shape, number of rows, dtype, and merged."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from axolotl_bitnet.ops.kernels import decode
from support.kernel_cases import DTYPES, expected, matrices, same

SHAPES = {
    "one matrix": (1, 40, [64]),
    "odd": (3, 37, [12]),
    "less than a tile": (2, 130, [4]),
    "merged": (5, 256, [64, 16, 16]),
    "merged, sizes unlike": (8, 96, [4, 100, 8]),
    "16 rows": (16, 192, [68]),
    "9 rows": (9, 64, [32, 32]),
    "many columns": (1, 2500, [8, 16]),
    "more than the kernel takes": (17, 64, [12, 8]),
}


@pytest.mark.parametrize(
    "shape, dtype",
    [*((shape, torch.bfloat16) for shape in SHAPES), *itertools.product(("odd", "merged"), DTYPES[::2])],
    ids=str,
)
def test_every_bit_is_the_definition_s(shape: str, dtype: torch.dtype) -> None:
    rows, columns, sizes = SHAPES[shape]
    codes, packed, s = matrices(sizes, columns)
    x = torch.randn(rows, columns)
    for bias in (None, torch.randn(sum(sizes))):
        found = decode.packed_matmul(x, packed, s, sizes, bias, dtype)
        same(found, expected(x, codes, s, sizes, bias, dtype))


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, 32, 33])
def test_every_number_of_rows(rows: int) -> None:
    """One, two, up to 8, to 16, twice as many, and the first that another kernel takes; with a matrix that
    ends within a tile."""
    codes, packed, s = matrices([60, 12], 128)
    x = torch.randn(rows, 128)
    found = decode.packed_matmul(x, packed, s, [60, 12], None, torch.bfloat16)
    same(found, expected(x, codes, s, [60, 12], None, torch.bfloat16))


@pytest.mark.parametrize("columns", [63, 64, 65, 192, 576])
@pytest.mark.parametrize("out", [60, 64, 68])
def test_around_a_tile_s_edges(columns: int, out: int) -> None:
    """A tile has 8 rows of bytes, which are 32 of the matrix, and steps have 64 columns."""
    codes, packed, s = matrices([out], columns)
    x, bias = torch.randn(3, columns), torch.randn(out)
    found = decode.packed_matmul(x, packed, s, [out], bias, torch.float32)
    same(found, expected(x, codes, s, [out], bias, torch.float32))


def test_ranks_strides_and_what_is_not_finite() -> None:
    codes, packed, s = matrices([16], 48)
    x = torch.randn(2, 3, 96)[..., ::2]
    x[0, 1, 5], x[1, 2, 0] = math.nan, math.inf
    found = decode.packed_matmul(x, packed, s, [16], None, torch.float32)
    assert found.shape == (2, 3, 16) and bool(found[0, 1].isnan().all()) and bool(found[1, 2].isnan().all())
    same(found, expected(x, codes, s, [16], None, torch.float32))


def test_the_largest_sums() -> None:
    """All codes 1 and all activations 127: nothing overflows on the way."""
    x, packed = torch.full((2, 4096), 3.5), torch.full((4, 4096), 0b10101010, dtype=torch.uint8)
    found = decode.packed_matmul(x, packed, torch.ones(1), [16], None, torch.float32)
    assert bool((found == 127 * 4096 / (127 * (1 / torch.tensor(3.5)))).all())
