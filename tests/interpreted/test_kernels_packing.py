"""kernels/packing.py against the packer's bytes."""

from __future__ import annotations

import pytest
import torch

from axolotl_bitnet import ops
from axolotl_bitnet.ops.kernels import packing as kernel
from support.kernel_cases import same


@pytest.mark.parametrize("rows", [4, 12, 128])
@pytest.mark.parametrize("columns", [1, 3, 64, 127, 1500])
def test_bytes(rows: int, columns: int) -> None:
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    same(kernel.pack_codes(codes), ops.pack_codes.plain(codes))
    same(kernel.unpack_codes(ops.pack_codes.plain(codes)), codes)


def test_any_layout() -> None:
    codes = torch.randint(-1, 2, (30, 8), dtype=torch.int8).t()
    same(kernel.pack_codes(codes), ops.pack_codes.plain(codes))
    bytes_ = ops.pack_codes.plain(codes)
    same(kernel.unpack_codes(bytes_.t().contiguous().t()), codes)


@pytest.mark.parametrize("value", [-1, 0, 1])
def test_each_code(value: int) -> None:
    codes = torch.full((8, 5), value, dtype=torch.int8)
    assert (kernel.pack_codes(codes) == (value + 1) * 0b01010101).all()
    same(kernel.unpack_codes(kernel.pack_codes(codes)), codes)
