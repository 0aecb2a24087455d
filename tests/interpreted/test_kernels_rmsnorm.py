"""kernels/rmsnorm.py: codes are those of the y it returns, to the bit; y itself within its roundings."""

from __future__ import annotations

import pytest
import torch

from axolotl_bitnet import ops, ternary
from axolotl_bitnet.ops.kernels import rmsnorm as kernel
from support.kernel_cases import (
    activations,
    all_same,
    by_dtype,
    by_mild_name,
    mild_activations,
)

EPS = 1e-6


@pytest.mark.parametrize(
    "dtype, seen",
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@by_mild_name
def test_forward(name: str, dtype: torch.dtype, seen: torch.dtype) -> None:
    x = mild_activations()[name].to(dtype)
    weight = torch.randn(x.shape[-1]).to(dtype)
    y, codes, r, rstd = kernel.rmsnorm_quantize(x, weight, EPS, seen)
    assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
    all_same((codes, r), ternary.quantize_activations(y.to(seen)))

    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS) * weight.double()
    unit = torch.finfo(dtype).eps / 2
    bound = (3 * unit + 8 * 2.0**-24) * exact.abs() + 2 * torch.finfo(dtype).smallest_normal
    assert ((y.double() - exact).abs() <= bound).all()
    torch.testing.assert_close(rstd, ops.rmsnorm_quantize.plain(x, weight, EPS, seen)[3], rtol=5e-7, atol=0)


def test_127_rows() -> None:
    y, codes, r, _ = kernel.rmsnorm_quantize(torch.randn(127, 100), torch.randn(100), EPS, torch.bfloat16)
    all_same((codes, r), ternary.quantize_activations(y.bfloat16()))


def test_y_is_rounded_as_the_models_round_it() -> None:
    """The normalized x to bfloat16, then the product: but for a last bit where the mean's sum differs."""
    x, weight = torch.randn(60, 64).bfloat16(), torch.randn(64).bfloat16()
    y, *_ = kernel.rmsnorm_quantize(x, weight, EPS, torch.bfloat16)
    expected, *_ = ops.rmsnorm_quantize.plain(x, weight, EPS, torch.bfloat16)
    once = (x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS) * weight).bfloat16()
    assert (y != expected).sum() <= 3 < 300 < (y != once).sum()


@by_dtype
def test_poison_stays_in_its_row(dtype: torch.dtype) -> None:
    x = activations()["poisoned"].to(dtype)
    y, codes, r, _ = kernel.rmsnorm_quantize(x, torch.ones(40, dtype=dtype), EPS, dtype)
    bad = ~x.isfinite().all(1)
    assert r.isnan().flatten().equal(bad) and not codes[bad].any() and codes[~bad].any(1).all()
    assert y[~bad].isfinite().all() and y[bad].isnan().any(1).all()


@pytest.mark.parametrize("rows", [1, 264, 300])
def test_backward_of_more_rows_than_programs(rows: int) -> None:
    check_backward(torch.randn(rows, 20))


@by_dtype
@by_mild_name
def test_backward_of_any_layout(name: str, dtype: torch.dtype) -> None:
    check_backward(mild_activations()[name].to(dtype))


def check_backward(x: torch.Tensor) -> None:
    weight, dy = torch.randn(x.shape[-1]).to(x.dtype), torch.randn(x.shape).to(x.dtype)
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    dx, dw = kernel.rmsnorm_backward(dy, x, weight, rstd)
    wide = [one.double().requires_grad_() for one in (x, weight)]
    normal = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + EPS)
    exact = torch.autograd.grad(normal * wide[1], wide, dy.double())
    normal, weighted = normal.detach().abs(), (dy.double() * weight.double()).abs()
    rows = normal.reshape(-1, x.shape[-1])
    terms = (
        rstd.double() * (weighted + normal * (weighted * normal).mean(-1, keepdim=True)),
        (dy.double().abs() * normal).reshape(rows.shape).sum(0),
    )
    for found, gradient, size in zip((dx, dw), exact, terms, strict=True):
        assert found.dtype == x.dtype and found.shape == gradient.shape and found.is_contiguous()
        bound = (torch.finfo(x.dtype).eps + 40 * 2.0**-24) * size + torch.finfo(x.dtype).tiny
        assert ((found.double() - gradient).abs() <= bound).all()
