"""kernels/swiglu.py against the formula with numpy's exp (the interpreter's), and against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from axolotl_bitnet import ops, ternary
from axolotl_bitnet.ops.kernels import gradients
from axolotl_bitnet.ops.kernels import swiglu as kernel
from support.kernel_cases import (
    activations,
    all_same,
    by_dtype,
    by_mild_name,
    by_name,
    last_bits,
    mild_activations,
    same,
)

F32 = torch.float32
HALVES = [
    (name, dtype)
    for name in ("a power of two", "31 rows", "just over a chunk", "sliced", "tiny")
    for dtype in (torch.bfloat16, torch.float16)
]


def operands(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate = activations()[name].to(dtype)
    generator = torch.Generator().manual_seed(gate.numel())
    return gate, torch.randn(gate.shape, generator=generator).to(dtype)


def product(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, silu rounded first, by numpy's exp."""
    x = gate.contiguous().float().numpy()
    with np.errstate(all="ignore"):
        activated = x / (np.float32(1) + np.exp(-x))
    assert activated.dtype == np.float32
    return torch.from_numpy(activated).to(gate.dtype) * up


@by_dtype
@by_name
def test_codes_and_scales(name: str, dtype: torch.dtype) -> None:
    gate, up = operands(name, dtype)
    all_same(kernel.swiglu_quantize(gate, up), ternary.quantize_activations(product(gate, up)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@by_mild_name
def test_codes_of_plain_torch(name: str, dtype: torch.dtype) -> None:
    """They differ only where the last bits of torch's own exp explain it: next to never."""
    gate, up = operands(name, dtype)
    codes, r = kernel.swiglu_quantize(gate, up)
    expected, scales = ops.swiglu_quantize.plain(gate, up)
    slack = torch.finfo(dtype).eps + 6 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(r, scales, rtol=slack, atol=0)
    wrong = codes != expected
    assert wrong.sum() <= 1 + 1e-3 * codes.numel()
    exact = (silu(gate) * up).double() * r
    assert ((exact.abs().frac() - 0.5).abs()[wrong] <= 127 * slack).all()


@by_dtype
def test_far_from_zero(dtype: torch.dtype) -> None:
    """silu(-x) for x so large that e**x is beyond float32: nothing, not little times a large x."""
    large = torch.finfo(dtype).max
    gate = torch.tensor([[-80.0, -100, -1e3, -1e4], [-large] * 4, [80.0, 100, 1e3, 1e4], [large] * 4]).to(
        dtype
    )
    up = torch.ones_like(gate)
    all_same(kernel.swiglu_quantize(gate, up), ternary.quantize_activations(product(gate, up)))
    dgate, dup, _ = kernel.swiglu_backward(up, gate, up, torch.ones(4, 1))
    torch.testing.assert_close((dgate, dup), ops.swiglu_backward.plain(up, gate, up, torch.ones(4, 1))[:2])


def test_127_rows() -> None:
    gate, up = torch.randn(2, 127, 100).bfloat16()
    all_same(kernel.swiglu_quantize(gate, up), ternary.quantize_activations(product(gate, up)))


def test_poison_stays_in_its_row() -> None:
    gate, up = torch.randn(4, 40), torch.randn(4, 40)
    gate[1, 3], up[2, 39] = torch.nan, torch.inf
    codes, r = kernel.swiglu_quantize(gate, up)
    assert r.isnan().flatten().tolist() == [False, True, True, False]
    assert not codes[1:3].any() and codes[[0, 3]].any(1).all()
    *_, h = kernel.swiglu_backward(torch.ones_like(gate), gate, up, r)
    assert h[1:3].isnan().all() and h[[0, 3]].isfinite().all()


def test_layouts_of_gate_and_up_may_differ() -> None:
    gate, up = torch.randn(30, 6).t(), torch.randn(6, 60)[:, ::2]
    all_same(kernel.swiglu_quantize(gate, up), ternary.quantize_activations(product(gate, up)))


@pytest.mark.parametrize("name, dtype", [*((name, F32) for name in mild_activations()), *HALVES], ids=str)
def test_backward(name: str, dtype: torch.dtype) -> None:
    gate, up = operands(name, dtype)
    dh = torch.randn(gate.shape).to(dtype)
    codes, r = kernel.swiglu_quantize(gate, up)
    dgate, dup, h = kernel.swiglu_backward(dh, gate, up, r)

    divided = ternary.dequantize(codes, r, dtype)
    same(h, divided if dtype == torch.float32 else (codes.float() * r.reciprocal()).to(dtype))
    assert last_bits(h, divided) <= 1 + 1e-3 * codes.numel()
    wide = [one.double().requires_grad_() for one in (gate, up)]
    exact = torch.autograd.grad(silu(wide[0]) * wide[1], wide, dh.double())
    for found, gradient in zip((dgate, dup), exact, strict=True):
        assert found.dtype == dtype and found.shape == gate.shape and found.is_contiguous()
        unit = torch.finfo(dtype).eps
        size = dh.double().abs() * (1 + up.double().abs()) * (1 + gate.double().abs())
        assert ((found.double() - gradient).abs() <= unit * size + 20 * 2.0**-24 * size).all()
    torch.testing.assert_close(
        (dgate, dup),
        ops.swiglu_backward.plain(dh, gate, up, r)[:2],
        rtol=2 * torch.finfo(dtype).eps,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "dtype, rows, columns",
    [(torch.bfloat16, 1, 1), (torch.float32, 70, 130), (torch.bfloat16, 66, 20)],
    ids=str,
)
def test_gradients_for_an_8_bit_backward(dtype: torch.dtype, rows: int, columns: int) -> None:
    """Those of the two kernels that they stand for, poison included."""
    gate, up, dh = (torch.randn(rows, columns).to(dtype) for _ in range(3))
    if rows > 1:
        gate[3, 2], dh[5, 7], up[6, 1] = -100, torch.nan, torch.inf
    codes, r_h = kernel.swiglu_quantize(gate, up)
    r = torch.rand(rows, 1) * 100 + 1
    dgate, dup, h, *peaks = kernel.swiglu_gradients(dh, gate, up, r_h, r)
    all_same((dgate, dup), kernel.swiglu_backward(dh, gate, up, r_h)[:2])
    same(h, codes)
    all_same(tuple(peaks), (*gradients.gradient_peaks(dgate, r), *gradients.gradient_peaks(dup, r)))
