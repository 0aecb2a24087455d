"""Products of two to sixteen rows on tensor cores, against the definition: on every cut."""

from __future__ import annotations

import math

import pytest
import torch

from axolotl_bitnet.ops import pack_codes
from axolotl_bitnet.ops.kernels import decode, registers
from axolotl_bitnet.ops.kernels.registers import Rows
from support.kernel_cases import expected, matrices, same

CUTS = [
    Rows(4, 1, 1, 2),
    Rows(4, 4, 1, 3),
    Rows(4, 4, 4, 1),
    Rows(8, 2, 1, 2),
    Rows(8, 4, 2, 2),
    Rows(8, 2, 2, 3),
]


@pytest.mark.parametrize("how", CUTS, ids=str)
@pytest.mark.parametrize("rows, columns", [(3, 64), (11, 576)])
def test_however_it_is_cut(rows: int, columns: int, how: Rows) -> None:
    """Less than a step and a turn that the columns do not fill; a tile that the rows do not."""
    sizes = [40, 12]
    codes, packed, s = matrices(sizes, columns)
    x, bias = torch.randn(rows, columns), torch.randn(sum(sizes))
    found = decode._few_rows(x, packed, s, tuple(sizes), bias, torch.bfloat16, how)
    same(found, expected(x, codes, s, sizes, bias, torch.bfloat16))


@pytest.mark.parametrize("lanes", [4, 8])
def test_each_quarter_of_a_byte_and_each_byte_of_a_word(lanes: int) -> None:
    """Two weights at a time are not 0, and each row of x is another."""
    x = torch.arange(1.0, 65.0) + torch.arange(12)[:, None]
    for place in range(0, 64, 21):
        codes = torch.zeros(64, 64, dtype=torch.int8)
        codes[place, place], codes[63 - place, 63 - place] = 1, -1
        how = Rows(lanes, 1, 1, 1)
        found = decode._few_rows(x, pack_codes(codes), torch.ones(1), (64,), None, torch.float32, how)
        same(found, expected(x, codes, torch.ones(1), [64], None, torch.float32))
        assert int(found.count_nonzero()) == 24


def test_the_largest_sums() -> None:
    """The fourth quarter's bits are worth 64 times their codes: they fit 32 bits with the most columns."""
    x, packed = torch.full((3, 32768), 3.5), torch.full((4, 32768), 0b10101010, dtype=torch.uint8)
    found = decode._few_rows(x, packed, torch.ones(1), (16,), None, torch.float32, Rows(4, 4, 1, 16))
    assert bool((found == 127 * 32768 / (127 * (1 / torch.tensor(3.5)))).all())


def test_ranks_strides_and_what_is_not_finite() -> None:
    codes, packed, s = matrices([16], 64)
    x = torch.randn(2, 3, 128)[..., ::2]
    x[0, 1, 5], x[1, 2, 0] = math.nan, math.inf
    found = decode.packed_matmul(x, packed, s, [16], None, torch.float32)
    assert found.shape == (2, 3, 16) and bool(found[0, 1].isnan().all()) and bool(found[1, 2].isnan().all())
    same(found, expected(x, codes, s, [16], None, torch.float32))


@pytest.mark.parametrize("rows, dtype", [(1, torch.float16), (2, torch.float32), (3, torch.float16)])
def test_codes_are_made_of_x_in_the_result_s_dtype(rows: int, dtype: torch.dtype) -> None:
    sizes = [24, 16, 4]
    codes, packed, s = matrices(sizes, 4160)
    x = torch.randn(rows, 4160)
    found = decode._few_rows(x, packed, s, tuple(sizes), None, dtype, Rows(4, 4, 1, 13))
    same(found, expected(x, codes, s, sizes, None, dtype))


@pytest.mark.parametrize("rows", [2, 8, 16])
@pytest.mark.parametrize(
    "out, columns", [(13312, 2048), (2048, 13312), (2048, 2048), (6912, 2560), (23040, 3072), (3072, 23040)]
)
def test_cuts_of_real_shapes(out: int, columns: int, rows: int) -> None:
    """Enough warps for a GPU, each with columns of its own."""
    how = registers.cut(out // 4, columns, rows)
    assert out // 4 // (how.lanes * how.tiles) * how.warps >= 256
    assert columns // 64 >= how.warps // how.tiles and how.warps % how.tiles == 0
