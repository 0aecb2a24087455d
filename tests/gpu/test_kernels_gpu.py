"""Every kernel on a GPU against plain torch on the same tensors: the definition's bits where it has them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from axolotl_bitnet import ops, ternary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

ROWS = [1, 3, 127, 1000, 4099]
# Falcon-E 1B and 3B, bitnet-2B-4T, Falcon3-10B; odd ones; the longest in registers, and a longer one
COLUMNS = [2048, 9216, 13312, 2560, 6912, 3072, 23040, 1, 3, 100, 1000, 1025, 2049, 32768, 32772]
# (in, out)
LAYERS = [
    (2048, 9216),
    (13312, 2048),
    (2048, 256),
    (2560, 640),
    (2560, 6912),
    (6912, 2560),
    (3072, 23040),
    (23040, 3072),
    (3072, 1024),
]
ODD_LAYERS = [(100, 60), (1000, 36), (7, 12), (1, 1), (2064, 200), (2056, 136), (4096, 4), (16, 4099)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def rows_of_all_kinds(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Of several magnitudes; among many, rows that are zero, tiny, poisoned, and with an outlier."""
    x = torch.randn(rows, columns, device="cuda") * torch.logspace(-2, 2, rows, device="cuda")[:, None]
    if rows > 100:
        x[7], x[11, 0], x[13, -1], x[17, columns // 2] = 0, math.nan, math.inf, -math.inf
        x[19] *= 1e-7
        x[23, columns // 3] = 3e4
    return x.to(dtype)


def same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def all_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        same(one, other)


# Activations


@by_dtype
@pytest.mark.parametrize("columns", COLUMNS)
def test_activations(columns: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        x = rows_of_all_kinds(rows, columns, dtype)
        for seen in {dtype, torch.bfloat16}:
            all_same(ops.quantize_activations(x, seen), ops.quantize_activations.plain(x, seen))
        all_same(ops.quantize_activations(x, dtype, 1e-30), ops.quantize_activations.plain(x, dtype, 1e-30))


def test_activations_are_the_cpu_ones() -> None:
    x = rows_of_all_kinds(300, 2560, torch.bfloat16)
    for one, other in zip(
        ops.quantize_activations(x, x.dtype), ternary.quantize_activations(x.cpu()), strict=True
    ):
        same(one.cpu(), other)


@by_dtype
def test_activations_of_any_layout(dtype: torch.dtype) -> None:
    whole = randn(6, 50, 2064, dtype=dtype)
    for x in (
        whole.transpose(0, 1),
        whole.permute(2, 1, 0),
        whole[:, ::3, 5:2000],
        whole[1, :, ::2],
        whole[0, :1].expand(9, 2064),
        whole[0, :, :1].expand(50, 100),
        whole[0, 0],
    ):
        all_same(ops.quantize_activations(x, dtype), ops.quantize_activations.plain(x, dtype))


def test_an_unaligned_tensor_after_an_aligned_one() -> None:
    """Same shape and strides: what was compiled for addresses of 16 bytes must not be taken for others."""
    whole = randn(40, 2064, dtype=torch.bfloat16)
    flat = randn(64 * 2048 + 3)
    for start in (0, 1, 3, 8):
        x = whole[:, start : start + 2048]
        all_same(ops.quantize_activations(x, x.dtype), ops.quantize_activations.plain(x, x.dtype))
    for start in (0, 1, 2, 3):
        weight = flat[start : start + 64 * 2048].view(64, 2048)
        all_same(ops.ternarize(weight), ops.ternarize.plain(weight))
        given = rows_codes(5, 2048), ops.ternarize.plain(weight)[:2]
        bias = flat[start : start + 64]
        same(
            ops.matmul(*given[0], *given[1], bias, torch.float32),
            ops.matmul.plain(*given[0], *given[1], bias, torch.float32),
        )


@by_dtype
@pytest.mark.parametrize("columns", [100, 2048, 13312])
def test_activations_back(columns: int, dtype: torch.dtype) -> None:
    codes, r = ops.quantize_activations.plain(rows_of_all_kinds(1000, columns, torch.float32), torch.float32)
    found, expected = ops.dequantize_activations(codes, r, dtype), ternary.dequantize(codes, r, dtype)
    if dtype == torch.float32:
        same(found, expected)
    else:  # by way of 1 / r
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)
        assert (found != expected).logical_and(~found.isnan()).sum() <= 1e-3 * found.numel()


# Weights


@by_dtype
@pytest.mark.parametrize("columns, out", LAYERS + ODD_LAYERS)
def test_weights(columns: int, out: int, dtype: torch.dtype) -> None:
    weight = (torch.randn(out, columns, device="cuda") * 0.03).to(dtype)
    codes, s, g = ops.ternarize.plain(weight)
    all_same(ops.ternarize(weight), (codes, s, g))
    all_same(ops.transposed_codes(weight, g), (codes.t().contiguous(), s))
    for wanted in DTYPES:
        same(ops.dequantized_weight(weight, g, wanted), ops.dequantized_weight.plain(weight, g, wanted))


def test_weights_are_the_cpu_ones() -> None:
    weight = torch.randn(1000, 1001, device="cuda")
    weight[0] = weight.bfloat16().abs().mean() / 2
    codes, s, g = ops.ternarize(weight)
    expected, scale = ternary.ternarize(weight.cpu())
    same(codes.cpu(), expected)
    same(s.cpu(), scale)
    assert g.cpu() == ternary.absmean(ternary.abs_sum(weight.cpu()), weight.numel())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_weight_poisons_the_scale(bad: float) -> None:
    weight = torch.randn(640, 2560, device="cuda")
    weight[333, 77] = bad
    codes, s, g = ops.ternarize(weight)
    assert s.isnan().all() and g.isnan() and not codes.any()
    assert ops.dequantized_weight(weight, g, torch.bfloat16).isnan().all()


@pytest.mark.parametrize("rows, columns", [(4, 1), (128, 127), (9216, 2048), (2560, 6912)])
def test_packing(rows: int, columns: int) -> None:
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8, device="cuda")
    packed = ops.pack_codes.plain(codes)
    same(ops.pack_codes(codes), packed)
    same(ops.unpack_codes(packed), codes)


# The product


def rows_codes(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return ops.quantize_activations.plain(randn(rows, columns), torch.float32)


def integers(codes_x: Tensor, codes_w: Tensor) -> Tensor:
    return codes_x.double() @ codes_w.double().t()  # far below 2**53


def scaled(product: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = ternary.dequantize_output(product, r, s).to(dtype)
    return y if bias is None else y + bias.to(dtype)


@by_dtype
@pytest.mark.parametrize("columns, out", LAYERS + ODD_LAYERS)
def test_product(columns: int, out: int, dtype: torch.dtype) -> None:
    codes_w, s, _ = ops.ternarize.plain(torch.randn(out, columns, device="cuda") * 0.02)
    for rows in ROWS:
        codes_x, r = rows_codes(rows, columns)
        product = integers(codes_x, codes_w)
        for bias in (None, randn(out), randn(out, dtype=dtype)):
            same(ops.matmul(codes_x, r, codes_w, s, bias, dtype), scaled(product, r, s, bias, dtype))
        onto = randn(rows, out, dtype=dtype)
        expected = onto + scaled(product, r, s, None, dtype)
        same(ops.matmul_onto(codes_x, r, codes_w, s, onto), expected)


@pytest.mark.parametrize("rows", ROWS)
def test_both_paths_of_the_product(rows: int) -> None:
    """Pointers, as on Ampere and Ada, and TMA where there is some."""
    from axolotl_bitnet.ops.kernels import matmul as kernel

    codes_w, s, _ = ops.ternarize.plain(torch.randn(640, 2560, device="cuda") * 0.02)
    codes_x, r = rows_codes(rows, 2560)
    expected = scaled(integers(codes_x, codes_w), r, s, None, torch.bfloat16)
    multiprocessors, has_tma, _ = kernel._gpu(0)
    y = torch.full_like(expected, math.nan)
    key = ("pointers alone", rows)
    kernel.launch_pointers(codes_x, r, codes_w, s, None, y, rows, key, kernel.pointer_tiles(rows))
    same(y, expected)
    if has_tma:
        y = torch.full_like(expected, math.nan)
        tiles = kernel.tma_tiles(rows, 640, 2)
        key = ("tma alone", rows)
        kernel.launch_tma(codes_x, r, codes_w, s, None, None, y, rows, key, multiprocessors, tiles)
        same(y, expected)


@by_dtype
def test_extremes_of_the_product(dtype: torch.dtype) -> None:
    """The largest integers, every quotient of small ones, poison in a row and in the scale."""
    codes_x = torch.full((3, 132_128), 127, dtype=torch.int8, device="cuda")
    codes_w = torch.ones(16, 132_128, dtype=torch.int8, device="cuda")
    codes_w[1, 1:] = 0
    s = torch.ones(1, dtype=torch.bfloat16, device="cuda")
    r = torch.tensor([[1.0], [3.0], [math.nan]], device="cuda")
    product = integers(codes_x, codes_w)
    assert product.max() > 2**24
    same(ops.matmul(codes_x, r, codes_w, s, None, dtype), scaled(product, r, s, None, dtype))

    codes_x = torch.arange(-127, 128, device="cuda").to(torch.int8)[:, None].expand(255, 16).contiguous()
    codes_w = torch.ones(16, 16, device="cuda").tril().to(torch.int8)
    product = integers(codes_x, codes_w)
    for exponent in range(-30, 31, 3):
        r = (torch.rand(255, 1, device="cuda") + 1) * 2.0**exponent
        s = (torch.rand(1, device="cuda") + 1).bfloat16()
        same(ops.matmul(codes_x, r, codes_w, s, None, dtype), scaled(product, r, s, None, dtype))
    assert ops.matmul(codes_x, r, codes_w, s * math.nan, None, dtype).isnan().all()


# SwiGLU and RMSNorm


@by_dtype
@pytest.mark.parametrize("columns", COLUMNS)
def test_swiglu_codes_are_those_of_torch(columns: int, dtype: torch.dtype) -> None:
    """The same exp, the same roundings as ``silu(gate) * up`` in eager torch on this GPU."""
    for rows in ROWS:
        gate, up = rows_of_all_kinds(rows, columns, dtype), randn(rows, columns, dtype=dtype)
        all_same(ops.swiglu_quantize(gate, up), ternary.quantize_activations(silu(gate) * up))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_swiglu_codes_of_every_gate(dtype: torch.dtype) -> None:
    """All 65536 numbers of 16 bits. Alone in its row, the scale says every bit of silu's."""
    gate = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(dtype)[:, None]
    for up in (torch.ones_like(gate), torch.full_like(gate, -0.3)):
        all_same(ops.swiglu_quantize(gate, up), ternary.quantize_activations(silu(gate) * up))


def relative_errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    return [
        float((one.double() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)
    ]


def no_worse(found: list[float], unfused: list[float]) -> None:
    for one, other in zip(found, unfused, strict=True):
        assert one <= 1.05 * other + 2e-7, (found, unfused)


@by_dtype
@pytest.mark.parametrize("columns", [2048, 9216, 13312, 100, 1025])
def test_swiglu_backward(columns: int, dtype: torch.dtype) -> None:
    gate, up, dh = (randn(1000, columns, dtype=dtype) for _ in range(3))
    codes, r = ops.swiglu_quantize(gate, up)
    *found, h = ops.swiglu_backward(dh, gate, up, r)
    r_x = torch.rand(1000, 1, device="cuda") * 100 + 1
    together = ops.swiglu_gradients(dh, gate, up, r, r_x)
    peaks = [each for one in found for each in ops.gradient_peaks.plain(one, r_x)]
    all_same(together, (*found, codes, *peaks))
    torch.testing.assert_close(h, ternary.dequantize(codes, r, dtype), rtol=torch.finfo(dtype).eps, atol=0)
    wide = [one.double().requires_grad_() for one in (gate, up)]
    exact = torch.autograd.grad(silu(wide[0]) * wide[1], wide, dh.double())
    narrow = [one.clone().requires_grad_() for one in (gate, up)]
    eager = torch.autograd.grad(silu(narrow[0]) * narrow[1], narrow, dh)
    no_worse(relative_errors(tuple(found), exact), relative_errors(eager, exact))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """As the models' own code has it."""
    x32 = x.to(torch.float32)
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@by_dtype
@pytest.mark.parametrize("columns", [2048, 2560, 3072, 100, 1, 1025, 23040])
def test_rmsnorm(columns: int, dtype: torch.dtype) -> None:
    weight = torch.rand(columns, device="cuda").to(dtype) + 0.5
    for rows in ROWS:
        x, dy = rows_of_all_kinds(rows, columns, dtype), randn(rows, columns, dtype=dtype)
        for seen in {dtype, torch.bfloat16}:
            y, codes, r, rstd = ops.rmsnorm_quantize(x, weight, 1e-6, seen)
            all_same((codes, r), ternary.quantize_activations(y.to(seen)))
        expected = norm(x, weight)
        good = expected.isfinite().all(1)
        bits = torch.finfo(dtype)
        rtol = (4 if dtype == torch.float32 else 2) * bits.eps  # the squares are summed in another order
        atol = rtol * bits.smallest_normal
        torch.testing.assert_close(y[good], expected[good], rtol=rtol, atol=atol)

        x, dy, rstd = x[good], dy[good], rstd[good]
        found = ops.rmsnorm_backward(dy, x, weight, rstd)
        wide = [one.double().requires_grad_() for one in (x, weight)]
        y64 = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + 1e-6) * wide[1]
        exact = torch.autograd.grad(y64, wide, dy.double())
        narrow = [one.clone().requires_grad_() for one in (x, weight)]
        eager = torch.autograd.grad(norm(*narrow), narrow, dy)
        if columns > 1:  # of one feature, the gradient of x is all but zero
            no_worse(relative_errors(found, exact), relative_errors(eager, exact))


# Gradients


@by_dtype
@pytest.mark.parametrize("columns", COLUMNS)
def test_gradients_along_rows_and_columns(columns: int, dtype: torch.dtype) -> None:
    for rows in (1, 127, 1000, 4099):
        dy = rows_of_all_kinds(rows, columns, dtype)
        dy[:, columns // 2] = 0
        r = torch.rand(rows, 1, device="cuda") * 1000 + 0.1
        peaks = ops.gradient_peaks(dy, r)
        all_same(peaks, ops.gradient_peaks.plain(dy, r))
        codes, *rest = ops.quantize_gradient(dy, r, *peaks)
        all_same((codes, *rest), ops.quantize_gradient.plain(dy, r, *peaks))
        same(ops.transposed_activations(codes), ops.transposed_activations.plain(codes))


def test_gradients_are_the_cpu_ones() -> None:
    dy, r = randn(500, 3000, dtype=torch.bfloat16) * 1e-6, torch.rand(500, 1, device="cuda") * 100 + 1
    peaks, cpu = ops.gradient_peaks(dy, r), ops.gradient_peaks(dy.cpu(), r.cpu())
    all_same(tuple(each.cpu() for each in peaks), cpu)
    found = ops.quantize_gradient(dy, r, *peaks)
    all_same(tuple(each.cpu() for each in found), ops.quantize_gradient(dy.cpu(), r.cpu(), *cpu))


@by_dtype
def test_gradients_of_any_layout(dtype: torch.dtype) -> None:
    r = torch.rand(48, 1, device="cuda") + 1
    base = randn(48, 200, dtype=dtype)
    for dy in (
        base[:, 1:],
        base[:, ::3],
        randn(90, 48, dtype=dtype).t(),
        randn(1, 64, dtype=dtype).expand(48, 64),
    ):
        peaks = ops.gradient_peaks(dy, r)
        all_same(peaks, ops.gradient_peaks.plain(dy, r))
        found = ops.quantize_gradient(dy, r, *peaks)
        all_same(found, ops.quantize_gradient.plain(dy, r, *peaks))


@by_dtype
@pytest.mark.parametrize("tokens", [16, 8192, 32768])
@pytest.mark.parametrize(
    "columns, out", [(2048, 9216), (2048, 256), (9216, 2048), (100, 60), (1, 1), (16, 4099)]
)
def test_weight_product(columns: int, out: int, tokens: int, dtype: torch.dtype) -> None:
    z, x = (torch.randint(-127, 128, (n, tokens), device="cuda", dtype=torch.int8) for n in (out, columns))
    z[0], x[0] = 127, -127
    c = torch.rand(out, 1, device="cuda") * 1e6 + 1
    same(ops.weight_product(z, c, x, dtype), ops.weight_product.plain(z, c, x, dtype))


# More than 2**31 elements


@pytest.fixture
def many() -> Tensor:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    x = torch.zeros(2**20 + 5, 2048, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[-7:], x[:3] = randn(7, 2048, dtype=x.dtype), randn(3, 2048, dtype=x.dtype)
    return x


@pytest.mark.slow
def test_long_tensors(many: Tensor) -> None:
    """Offsets that 32 bits cannot say: the last rows are theirs, and zeros stay zeros."""
    for part in (slice(-7, None), slice(0, 3), slice(2**20 - 20, 2**20 - 10)):
        codes, r = ops.quantize_activations(many, many.dtype)
        expected = ops.quantize_activations.plain(many[part], many.dtype)
        all_same((codes[part], r[part]), expected)
        back = ops.dequantize_activations(codes, r, torch.bfloat16)[part]
        same(back, ops.dequantize_activations(*expected, torch.bfloat16))
        codes_w, s, _ = ops.ternarize.plain(torch.randn(2048, 2048, device="cuda"))
        y = ops.matmul(codes, r, codes_w, s, None, torch.bfloat16)
        same(y[part], ops.matmul.plain(*expected, codes_w, s, None, torch.bfloat16))
        del codes, r, back, y


@pytest.mark.slow
def test_long_tensors_in_fused_operations(many: Tensor) -> None:
    part = slice(-7, None)
    codes, r = ops.swiglu_quantize(many, many)
    all_same((codes[part], r[part]), ops.swiglu_quantize.plain(many[part], many[part]))
    gradients = ops.swiglu_backward(many, many, many, r)
    few = ops.swiglu_backward(many[part], many[part], many[part], r[part])
    all_same(tuple(one[part] for one in gradients), few)
    del codes, r, gradients
    weight = randn(2048, dtype=many.dtype)
    y, codes, r, rstd = ops.rmsnorm_quantize(many, weight, 1e-6, many.dtype)
    expected = ops.rmsnorm_quantize(many[part], weight, 1e-6, many.dtype)
    all_same((y[part], codes[part], r[part], rstd[part]), expected)
    dx, _ = ops.rmsnorm_backward(many, many, weight, rstd)
    same(dx[part], ops.rmsnorm_backward(many[part], many[part], weight, rstd[part])[0])


@pytest.mark.slow
def test_a_long_weight() -> None:
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    weight = torch.zeros(2**20 + 4, 2048, dtype=torch.bfloat16, device="cuda")
    weight[-2:] = 100
    weight[-1, -5:] = -100
    codes, s, g = ops.ternarize(weight)
    assert g.item() == pytest.approx(2 * 2048 * 100 / weight.numel()) and s.isfinite().all()
    assert codes[:-2].any().item() is False and (codes[-2] == 1).all() and codes[-1].sum() == 2048 - 10
    transposed, _ = ops.transposed_codes(weight, g)
    same(transposed[:, -9:].contiguous(), codes[-9:].t().contiguous())
    assert (ops.dequantized_weight(weight, g, torch.bfloat16)[-9:] != 0).sum() == 2 * 2048
    same(ops.unpack_codes(ops.pack_codes(codes))[-9:], codes[-9:])


def test_what_is_compared_are_two_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl_bitnet.ops import operation
    from axolotl_bitnet.ops.kernels import weights

    launched = []
    original = weights.launch

    def watching(kernel: Any, *rest: Any, **more: Any) -> None:
        launched.append(kernel)
        original(kernel, *rest, **more)

    monkeypatch.setattr(weights, "launch", watching)
    weight = torch.randn(60, 100, device="cuda")
    ops.ternarize(weight)
    assert len(launched) == 2
    ops.ternarize.plain(weight)
    monkeypatch.setattr(operation, "_gpu_has_kernels", lambda _: False)
    ops.ternarize(weight)
    assert len(launched) == 2


def test_float64_is_left_to_torch() -> None:
    x, weight = torch.randn(5, 64, device="cuda", dtype=torch.float64), torch.randn(32, 64, device="cuda")
    codes, r = ops.quantize_activations(x, x.dtype)
    all_same((codes, r), ops.quantize_activations.plain(x, x.dtype))
    codes_w, s, _ = ops.ternarize(weight)
    same(
        ops.matmul(codes, r, codes_w, s, None, x.dtype), ops.matmul.plain(codes, r, codes_w, s, None, x.dtype)
    )
