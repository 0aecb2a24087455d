"""kernels/weights.py against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from axolotl_bitnet import ops, ternary
from axolotl_bitnet.ops.kernels import weights as kernel
from support.kernel_cases import all_same, by_dtype, same


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.03

    # Of mean 1/32: exactly half of it, and bfloat16's next above the half.
    halves = torch.tensor([[0.5, 1.5, -0.5, -1.5], [0.50390625, 1.5, -0.99609375, -1]]) / 32
    return {
        "one element": randn(1, 1),
        "one row": randn(1, 77),
        "one column": randn(77, 1),
        "odd": randn(67, 129),
        "a power of two": randn(64, 128),
        "tiles": randn(65, 192),
        "transposed": randn(50, 36).t(),
        "sliced": randn(40, 90)[3::2, 1::3],
        "expanded": randn(1, 40).expand(12, 40),
        "some blocks": randn(90, 200),
        "halves": halves.repeat(8, 5),
        "zeros": torch.zeros(8, 20),
        "below epsilon": randn(8, 20) * 1e-5,
        "huge": randn(8, 20) * 1e36,
        "one outlier": torch.cat([randn(7, 20), torch.full((1, 20), 50.0)]),
    }


@pytest.fixture(params=[(512, 16384), (8, 128), (1, 4096)], ids=str)
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs and bytes a block: as they are; more blocks than programs; one program."""
    monkeypatch.setattr(kernel, "_PROGRAMS", request.param[0])
    monkeypatch.setattr(kernel, "_BLOCK", request.param[1])


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs them one after another."""
    monkeypatch.setattr(kernel, "_PROGRAMS", 8)
    monkeypatch.setattr(kernel, "_BLOCK", 2048)


by_matrix = pytest.mark.parametrize("name", matrices())


@by_dtype
@by_matrix
def test_codes_and_scales(oracle, few_programs: None, name: str, dtype: torch.dtype) -> None:
    weight = matrices()[name].to(dtype)
    codes, s, g = kernel.ternarize(weight)
    all_same((codes, s), ternary.ternarize(weight))
    same(g, ternary.absmean(ternary.abs_sum(weight), weight.numel()))
    if weight.isfinite().all():
        expected, scale = oracle.weights(weight)
        assert (codes.numpy() == expected).all() and s.float().item() == scale


def test_any_cut(cut: None) -> None:
    weight = torch.randn(37, 41).bfloat16()
    all_same(kernel.ternarize(weight), ops.ternarize.plain(weight))


def test_exactly_half_is_zero(few_programs: None) -> None:
    codes, s, g = kernel.ternarize(matrices()["halves"])
    assert g == 1 / 32 and s == 32
    assert torch.equal(codes[0, :4], torch.tensor([0, 1, 0, -1], dtype=torch.int8))
    assert torch.equal(codes[1, :4], torch.tensor([1, 1, -1, -1], dtype=torch.int8))


def test_the_sum_is_wider_than_float32(few_programs: None) -> None:
    """A float32 sum, of any order, would lose these: the mean decides about every code next to g / 2."""
    weight = torch.full((512, 512), 2.0**-12)
    weight[0, 0] = 2.0**13
    _, _, g = kernel.ternarize(weight)
    assert g.item() == torch.tensor((2.0**13 + (2**18 - 1) * 2.0**-12) / 2**18).item()


@by_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_weight_poisons_the_scale(few_programs: None, bad: float, dtype: torch.dtype) -> None:
    weight = matrices()["odd"].to(dtype)
    weight[40, 3] = bad
    codes, s, g = kernel.ternarize(weight)
    assert s.isnan().all() and g.isnan() and not codes.any()
    all_same((codes, s, g), ops.ternarize.plain(weight))
    same(kernel.dequantized_weight(weight, g, dtype), ops.dequantized_weight.plain(weight, g, dtype))
    all_same(kernel.transposed_codes(weight, g), ops.transposed_codes.plain(weight, g))


@pytest.mark.parametrize(
    "dtype, out",
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@by_matrix
def test_dequantized(name: str, dtype: torch.dtype, out: torch.dtype) -> None:
    weight = matrices()[name].to(dtype)
    codes, s = ternary.ternarize(weight)
    g = ternary.absmean(ternary.abs_sum(weight), weight.numel())
    same(kernel.dequantized_weight(weight, g, out), ternary.dequantize(codes, s, out))


@by_dtype
@by_matrix
def test_transposed(name: str, dtype: torch.dtype) -> None:
    weight = matrices()[name].to(dtype)
    codes, s = ternary.ternarize(weight)
    g = ternary.absmean(ternary.abs_sum(weight), weight.numel())
    all_same(kernel.transposed_codes(weight, g), (codes.t(), s))
