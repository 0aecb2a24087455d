"""kernels/activations.py against the definition."""

from __future__ import annotations

import pytest
import torch

from axolotl_bitnet import ops, ternary
from axolotl_bitnet.ops.kernels import activations as kernel
from support.kernel_cases import activations, all_same, by_dtype, by_name, last_bits, same


@by_dtype
@by_name
def test_codes_and_scales(oracle, name: str, dtype: torch.dtype) -> None:
    x = activations()[name].to(dtype)
    codes, r = kernel.quantize_activations(x, dtype)
    all_same((codes, r), ternary.quantize_activations(x))
    if x.isfinite().all():
        expected, scales = oracle.activations(x)  # and the formulas once more, in numpy
        assert (codes.numpy() == expected).all() and (r.numpy() == scales).all()


@pytest.mark.parametrize(
    "given, dtype",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)
@by_name
def test_x_is_rounded_to_the_dtype_first(name: str, given: torch.dtype, dtype: torch.dtype) -> None:
    """What autocast does: float32 in, quantized in bfloat16. Overflow to Inf poisons the row."""
    x = activations()[name].to(given)
    all_same(kernel.quantize_activations(x, dtype), ternary.quantize_activations(x.to(dtype)))


@pytest.mark.parametrize("floor", [1e-30, 1e-8, 1.0])
@pytest.mark.parametrize("name", ["tiny", "zero rows", "denormal", "poisoned", "one row"])
def test_another_floor(name: str, floor: float) -> None:
    """Gradients are small, and have one of their own."""
    x = activations()[name]
    all_same(kernel.quantize_activations(x, x.dtype, floor), ternary.quantize_activations(x, floor))


def test_127_rows() -> None:
    x = torch.randn(127, 100).bfloat16()
    all_same(kernel.quantize_activations(x, x.dtype), ternary.quantize_activations(x))


def test_rounding_first_is_another_result() -> None:
    x = torch.randn(20, 100)
    (rounded, _), (whole, _) = (
        kernel.quantize_activations(x, dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    assert not torch.equal(rounded, whole)


def test_ties_go_to_even() -> None:
    x = activations()["halves"]
    codes, r = kernel.quantize_activations(x, torch.float32)
    ties = (x * r).frac().abs() == 0.5
    assert ties.sum() > 300 and not (codes[ties] % 2).any()


def test_poison_stays_in_its_row() -> None:
    x = activations()["poisoned"]
    codes, r = kernel.quantize_activations(x, torch.float32)
    bad = ~x.isfinite().all(1)
    assert bad.tolist() == [False, True, True, False, True, True, False]
    assert r.isnan().flatten().equal(bad) and not codes[bad].any() and codes[~bad].any(1).all()


@pytest.mark.parametrize("columns", [1, 3, 1000, 2048, 2049, 6912, 9216, 13312, 23040, 32768])
def test_chunks_cover_a_row(columns: int) -> None:
    chunk, number = kernel.chunks(columns)
    assert chunk & (chunk - 1) == 0 and (number - 1) * chunk < columns <= number * chunk


@by_dtype
@by_name
def test_back(name: str, dtype: torch.dtype) -> None:
    x = activations()[name].contiguous()
    codes, r = ops.quantize_activations.plain(x, torch.float32)
    found = kernel.dequantize_activations(codes, r, dtype)
    if dtype == torch.float32:
        same(found, ternary.dequantize(codes, r, dtype))
    else:  # by way of 1 / r: the last bit, at most, and seldom
        same(found, (codes.float() * r.reciprocal()).to(dtype))
        assert last_bits(found, ternary.dequantize(codes, r, dtype)) <= 1 + 1e-3 * codes.numel()
