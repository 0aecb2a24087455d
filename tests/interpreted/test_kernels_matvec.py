"""Products of one row and a few by words of four bytes, against the definition: on every cut."""

from __future__ import annotations

import pytest
import torch

from axolotl_bitnet.ops import pack_codes
from axolotl_bitnet.ops.kernels import decode, matvec
from axolotl_bitnet.ops.kernels.matvec import Tile
from support.kernel_cases import expected, matrices, same

CUTS = [Tile(1, 4, 128, 1, 4, False), Tile(2, 4, 128, 2, 4, False), Tile(4, 2, 128, 3, 4, False)]
CUTS += [Tile(1, 4, 256, 1, 8, False), Tile(1, 4, 128, 4, 4, True), Tile(2, 4, 256, 2, 8, True)]


@pytest.mark.parametrize(
    "rows, dtype",
    [(1, torch.float32), (1, torch.bfloat16), (1, torch.float16), (2, torch.bfloat16)],
)
def test_every_bit_is_the_definition_s(rows: int, dtype: torch.dtype) -> None:
    sizes = [24, 16, 4]
    codes, packed, s = matrices(sizes, 576)
    x = torch.randn(rows, 576)
    for bias in (None, torch.randn(sum(sizes))):
        found = decode.packed_matmul(x, packed, s, sizes, bias, dtype)
        same(found, expected(x, codes, s, sizes, bias, dtype))


@pytest.mark.parametrize(
    "columns, how",
    [(1600, CUTS[0]), *zip((64, 512, 576, 64, 512, 576), CUTS, strict=True)],
)
def test_however_it_is_cut(columns: int, how: Tile) -> None:
    """Less than a step, whole steps, and a turn that the columns do not fill."""
    sizes = [40, 12]
    codes, packed, s = matrices(sizes, columns)
    x = torch.randn(2, columns)
    found = decode._few_rows(x, packed, s, tuple(sizes), None, torch.bfloat16, how)
    same(found, expected(x, codes, s, sizes, None, torch.bfloat16))


def test_each_quarter_of_a_byte_and_each_byte_of_a_word() -> None:
    """One weight at a time is not 0: its product is where it belongs, with its sign."""
    x = torch.arange(1.0, 65.0)[None]
    for place in range(16):
        codes = torch.zeros(16, 64, dtype=torch.int8)
        codes[place, place], codes[15 - place, 63 - place] = 1, -1
        found = decode.packed_matmul(x, pack_codes(codes), torch.ones(1), [16], None, torch.float32)
        same(found, expected(x, codes, torch.ones(1), [16], None, torch.float32))
        assert int(found.count_nonzero()) == 2


def test_the_largest_sums() -> None:
    """The fourth quarter's bits are worth 64 times their codes: they fit 32 bits with the most columns."""
    x = torch.full((1, 32768), 3.5)
    for byte, sign in ((0b10101010, 1), (0, -1)):
        packed = torch.full((4, 32768), byte, dtype=torch.uint8)
        found = decode.packed_matmul(x, packed, torch.ones(1), [16], None, torch.float32)
        assert bool((found == sign * 127 * 32768 / (127 * (1 / torch.tensor(3.5)))).all())


@pytest.mark.parametrize("rows, columns", [(3, 1024), (2, 4096), (1, 1000)])
def test_what_it_does_not_take(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes to tensor cores, and where rows of bytes are not aligned, is unpacked first."""
    monkeypatch.setattr(decode, "matvec", None)
    codes, packed, s = matrices([16], columns)
    x = torch.randn(rows, columns)
    found = decode.packed_matmul(x, packed, s, [16], None, torch.bfloat16)
    same(found, expected(x, codes, s, [16], None, torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "out, columns", [(13312, 2048), (2048, 13312), (2048, 2048), (6912, 2560), (23040, 3072), (3072, 23040)]
)
def test_cuts_of_real_shapes(out: int, columns: int, rows: int) -> None:
    """Every turn of the loop but the last is whole; enough programs for a GPU; no more held than fits."""
    how = matvec.tile(out // 4, columns, rows)
    steps = -(-columns // 4 // how.wide)
    assert -(-steps // how.held) * how.held - steps < how.held
    assert out // 4 // (how.each * how.beside) >= 128
    assert how.held >= steps if how.whole else how.each * how.held * rows <= 16
    assert not how.whole or columns * rows <= 64 * how.wide


@pytest.mark.parametrize("rows, dtype", [(1, torch.bfloat16), (3, torch.float32)])
def test_rows_that_lie_apart_and_rows_of_nothing(rows: int, dtype: torch.dtype) -> None:
    """x is read where it is, and quantized by every program: zeros, infinities and NaN too."""
    sizes = [64]
    codes, packed, s = matrices(sizes, 128)
    x = torch.randn(rows, 192)[:, 64:].to(dtype)
    x[0, 5] = float("nan")
    x[rows - 1] = 0
    found = decode.packed_matmul(x, packed, s, sizes, None, dtype)
    same(found, expected(x, codes, s, sizes, None, dtype))
