"""kernels/matmul.py against exact integers and one division, correctly rounded."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from axolotl_bitnet import ops, ternary
from axolotl_bitnet.ops.kernels import matmul as kernel
from support.kernel_cases import DTYPES, by_dtype, same

TMA = [
    kernel.Tiles(16, 16, 32, 1, 1),
    kernel.Tiles(16, 32, 32, 2, 2, 2),
    kernel.Tiles(32, 16, 64, 3, 4, 1, 2),
    kernel.Tiles(64, 64, 16, 2, 4, 2, 2),
]
POINTERS = [kernel.Tiles(16, 16, 32, 1, 1), kernel.Tiles(32, 64, 64, 4, 4), kernel.Tiles(64, 16, 128, 2, 4)]
# rows, columns, out_features
ALIGNED = [(1, 16, 16), (3, 48, 80), (127, 32, 16), (147, 16, 48), (33, 176, 112)]
ODD = [(1, 1, 1), (3, 7, 5), (127, 33, 9), (150, 20, 37), (17, 129, 66)]


def operands(rows: int, columns: int, out_features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes_x, r = ops.quantize_activations.plain(torch.randn(rows, columns), torch.float32)
    codes_w, s, _ = ops.ternarize.plain(torch.randn(out_features, columns) * 0.02)
    return codes_x, r, codes_w, s


def definition(
    codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    product = codes_x.long() @ codes_w.long().t()
    y = ternary.dequantize_output(product, r, s).to(dtype)
    return y if bias is None else y + bias.to(dtype)


def biases(bias: str, out_features: int) -> Tensor | None:
    return None if bias == "none" else torch.randn(out_features).to(getattr(torch, bias))


DTYPES_AND_BIASES = list(itertools.product(DTYPES, ["none", "float32", "bfloat16"]))
by_dtype_and_bias = pytest.mark.parametrize("dtype, bias", DTYPES_AND_BIASES, ids=str)


def combinations(*choices: Any) -> pytest.MarkDecorator:
    """All of shapes, tiles and so on, each with the next of the dtypes and biases in turn."""
    turns = itertools.cycle(DTYPES_AND_BIASES)
    return pytest.mark.parametrize("case", [(*c, *next(turns)) for c in itertools.product(*choices)], ids=str)


@combinations(ALIGNED, TMA, [1, 3, 1000])
def test_tma(case: tuple[Any, ...]) -> None:
    """Few programs walk many tiles each; more than there are tiles, one."""
    shape, tiles, programs, dtype, bias = case
    given, added = operands(*shape), biases(bias, shape[2])
    y = torch.full((shape[0], shape[2]), math.nan, dtype=dtype)
    kernel.launch_tma(*given, added, None, y, shape[0], (), programs, tiles)
    same(y, definition(*given, added, dtype))


@combinations(ALIGNED + ODD, POINTERS)
def test_pointers(case: tuple[Any, ...]) -> None:
    shape, tiles, dtype, bias = case
    given, added = operands(*shape), biases(bias, shape[2])
    y = torch.full((shape[0], shape[2]), math.nan, dtype=dtype)
    kernel.launch_pointers(*given, added, y, shape[0], (), tiles)
    same(y, definition(*given, added, dtype))


@by_dtype_and_bias
@pytest.mark.parametrize("shape", [(3, 48, 80), (70, 64, 600), (17, 129, 66)], ids=str)
def test_matmul(shape: tuple[int, ...], dtype: torch.dtype, bias: str) -> None:
    given, added = operands(*shape), biases(bias, shape[2])
    same(kernel.matmul(*given, added, dtype), definition(*given, added, dtype))
    same(kernel.matmul(*given, added, dtype), ops.matmul.plain(*given, added, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 48, 80), (70, 64, 600), (17, 129, 66), (200, 32, 136)], ids=str)
def test_matmul_onto(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Two roundings: of the product, and of the sum."""
    given, onto = operands(*shape), torch.randn(shape[0], shape[2]).to(dtype)
    found = kernel.matmul_onto(*given, onto)
    same(found, onto + definition(*given, None, dtype))
    same(found, ops.matmul_onto.plain(*given, onto))


@combinations(ALIGNED + ODD)
def test_matmul_of_any_shape(case: tuple[Any, ...]) -> None:
    shape, dtype, bias = case
    given, added = operands(*shape), biases(bias, shape[2])
    same(kernel.matmul(*given, added, dtype), definition(*given, added, dtype))


@pytest.mark.parametrize(
    "columns, out_features, dtype, path",
    [
        (16, 8, torch.bfloat16, "tma"),
        (16, 4, torch.float32, "tma"),
        (24, 8, torch.bfloat16, "pointers"),
        (16, 4, torch.bfloat16, "pointers"),
        (16, 10, torch.float32, "pointers"),
    ],
)
def test_rows_of_16_bytes_go_by_tma(
    monkeypatch: pytest.MonkeyPatch, columns: int, out_features: int, dtype: torch.dtype, path: str
) -> None:
    """TMA cannot address other rows, of x, w or y."""
    taken: list[str] = []
    monkeypatch.setattr(kernel, "launch_tma", lambda *_: taken.append("tma"))
    monkeypatch.setattr(kernel, "launch_pointers", lambda *_: taken.append("pointers"))
    kernel.matmul(*operands(3, columns, out_features), None, dtype)
    monkeypatch.setattr(kernel, "_gpu", lambda _: (100, False, False))
    kernel.matmul(*operands(3, columns, out_features), None, dtype)
    assert taken == [path, "pointers"]


@pytest.mark.parametrize("lead", [(), (2, 3), (1, 2, 1, 4)])
def test_any_rank(lead: tuple[int, ...]) -> None:
    codes_x, r = ops.quantize_activations.plain(torch.randn(*lead, 48), torch.float32)
    codes_w, s, _ = ops.ternarize.plain(torch.randn(20, 48))
    y = kernel.matmul(codes_x, r, codes_w, s, None, torch.float32)
    assert y.shape == (*lead, 20)
    same(y, definition(codes_x, r, codes_w, s, None, torch.float32))


@pytest.mark.parametrize("columns", [2048, 132_128, 132_129])
def test_the_sum_is_an_exact_integer(columns: int) -> None:
    """The largest codes there are, beyond 2**24, where float32 has gaps: rounded once, at the end."""
    codes_x = torch.full((2, columns), 127, dtype=torch.int8)
    codes_x[1, ::3] = -126
    codes_w = torch.ones(4, columns, dtype=torch.int8)
    codes_w[1, 1::2], codes_w[2, :-1] = -1, 0
    given = codes_x, torch.tensor([[1.0], [3.0]]), codes_w, torch.ones(1, dtype=torch.bfloat16), None
    expected = definition(*given, torch.float32)
    long = kernel.Tiles(16, 16, 2048, 1, 4)
    y = torch.empty(2, 4)
    kernel.launch_pointers(*given, y, 2, (), long)
    same(y, expected)
    if columns % 16 == 0:
        y = torch.empty(2, 4)
        kernel.launch_tma(*given, None, y, 2, (), 2, long)
        same(y, expected)
    whole = torch.tensor(127 * columns).float().item()
    assert y[0].tolist() == [whole, 127.0 * (columns % 2), 127.0, whole]


@pytest.mark.parametrize("shape", [(5, 32, 16), (5, 33, 9)])
@by_dtype
def test_poison(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes_x, r, codes_w, s = operands(*shape)
    codes_x[2], r[2] = 0, math.nan
    y = kernel.matmul(codes_x, r, codes_w, s, torch.ones(shape[2]), dtype)
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()
    y = kernel.matmul(codes_x, r, codes_w, torch.full_like(s, math.nan), None, dtype)
    assert y.isnan().all()
