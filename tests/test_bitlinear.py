"""BitLinear: its bits and its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from axolotl_bitnet import ternary
from axolotl_bitnet.layers.bitlinear import BitLinear
from support.layers import BF16, FLOAT32, assert_gradients, by_name, layer_for, run

# The forward, to the bit


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@by_name
def test_forward_is_the_formula(
    oracle, name: str, x: Tensor, dtype: torch.dtype, weight_dtype: torch.dtype, bias: bool
) -> None:
    x = x.to(dtype)
    layer = layer_for(x, bias=bias, dtype=weight_dtype)
    y = layer(x)
    expected = torch.from_numpy(oracle.forward(x, layer.weight)).to(dtype)
    if bias:
        expected = expected + layer.bias.detach().to(dtype)
    assert y.dtype == dtype and y.shape == (*x.shape[:-1], 13)
    assert torch.equal(y, expected)


@by_name
def test_forward_approximates_the_dense_product(name: str, x: Tensor) -> None:
    """Not the same formula twice: y is near ``x . (codes_w / s)^T``, within half a code of x an element."""
    layer = layer_for(x)
    codes, s = ternary.ternarize(layer.weight.detach())
    dense = ternary.dequantize(codes, s, torch.float64)
    step = x.double().abs().amax(dim=-1, keepdim=True) / 127
    bound = (0.5 + 1e-4) * step * dense.abs().sum(dim=1) + 1e-5
    assert ((layer(x).double() - x.double() @ dense.t()).abs() <= bound).all()


def packed_layer(layer: BitLinear) -> nn.Module:
    """transformers' packed BitLinear with our codes and our scale, in float32."""
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    codes, s = ternary.ternarize(layer.weight.detach())
    packed = bitnet.BitLinear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=torch.float32
    )
    packed.weight = bitnet.pack_weights(codes.clone())  # it adds 1 in place
    packed.weight_scale = s.float()
    if layer.bias is not None:
        packed.bias = layer.bias.detach()
    return packed


@pytest.fixture
def eager() -> Iterator[None]:
    """transformers decorates its functions with torch.compile, whose C++ would take minutes here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features, in_features", [(4, 1), (8, 7), (64, 64), (36, 129), (128, 640)])
def test_transformers_packed_layer_agrees_to_the_bit(
    eager: None, bias: bool, out_features: int, in_features: int
) -> None:
    layer = layer_for(torch.empty(in_features), out_features, bias)
    packed = packed_layer(layer)
    x = torch.randn(3, 50, in_features) * torch.logspace(-7, 3, 50)[:, None]  # some rows are below epsilon
    x[0, 0] = 0
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(packed(x), y)
        packed.weight_scale = packed.weight_scale * (1 + 2**-7)  # and another scale would have been seen
        assert not torch.equal(packed(x), y)


# The gradients


@pytest.mark.parametrize("bias", [False, True])
@by_name
def test_gradients_in_float32(oracle, name: str, x: Tensor, bias: bool) -> None:
    layer = layer_for(x, bias=bias)
    _, dx, dy = run(layer, x)
    assert_gradients(oracle, layer, x, dx, dy, FLOAT32)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@by_name
def test_gradients_in_bf16(oracle, name: str, x: Tensor, weight_dtype: torch.dtype) -> None:
    x = x.bfloat16()
    layer = layer_for(x, bias=True, dtype=weight_dtype)
    _, dx, dy = run(layer, x)
    assert dx.dtype == torch.bfloat16 and layer.weight.grad.dtype == weight_dtype
    assert_gradients(oracle, layer, x, dx, dy, BF16)


def test_gradient_is_straight_through_not_of_the_dense_layer(oracle) -> None:
    x = torch.randn(40, 64)
    layer = layer_for(x)
    _, dx, dy = run(layer, x)
    dense_dx, dense_dw = dy @ layer.weight.detach(), dy.t() @ x
    assert (dx - dense_dx).norm() > 0.1 * dense_dx.norm()
    assert 1e-3 < (layer.weight.grad - dense_dw).norm() / dense_dw.norm() < 0.1
    # nothing is masked: latents far outside [-g, g] move as well
    with torch.no_grad():
        layer.weight[:3] *= 100
    layer.weight.grad = None
    run(layer, x, dy)
    assert (layer.weight.grad[:3] != 0).all()


def test_gradient_in_float16_does_not_overflow(oracle) -> None:
    x = torch.randn(6, 32).half()
    layer = layer_for(x, out_features=256)
    codes, _ = ternary.ternarize(layer.weight.detach())
    dy = (torch.where(codes[:, :1] >= 0, 1.0, -1.0).t() * 1000).half().expand(6, 256)
    assert not torch.isfinite(dy @ codes.half()).all()  # the sum before it is scaled
    _, dx, _ = run(layer, x, dy)
    assert torch.isfinite(dx).all()
    _, w_hat = oracle.operands(x, layer.weight)
    torch.testing.assert_close(dx.double(), dy.double() @ w_hat, rtol=2e-3, atol=2e-3 * 1000)


def test_float64_input_keeps_its_dtype(oracle) -> None:
    x = torch.randn(4, 12, dtype=torch.float64)
    y, dx, _ = run(layer_for(x), x)
    assert y.dtype == dx.dtype == torch.float64


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x = torch.randn(4, 12)
    layer = layer_for(x, bias=True)
    _, dx, dy = run(layer, x)
    dw, db = layer.weight.grad, layer.bias.grad

    layer.zero_grad()
    layer(x).backward(dy)  # x without grad
    assert torch.equal(layer.weight.grad, dw) and torch.equal(layer.bias.grad, db) and x.grad is None

    layer.zero_grad()
    layer.weight.requires_grad_(False)
    _, again, _ = run(layer, x, dy)
    assert torch.equal(again, dx) and layer.weight.grad is None and torch.equal(layer.bias.grad, db)

    layer.requires_grad_(False)
    assert not layer(x).requires_grad


def test_double_backward_is_refused() -> None:
    x = torch.randn(4, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer_for(x)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_gradients_accumulate() -> None:
    x = torch.randn(3, 5, 12)
    layer = layer_for(x, bias=True)
    parts = []
    for part in x:
        layer.zero_grad()
        layer(part).sum().backward()
        parts.append((layer.weight.grad.clone(), layer.bias.grad.clone()))
    layer.zero_grad()
    for part in x:
        layer(part).sum().backward()
    assert torch.equal(layer.weight.grad, parts[0][0] + parts[1][0] + parts[2][0])
    assert torch.equal(layer.bias.grad, parts[0][1] + parts[1][1] + parts[2][1])


def test_a_step_between_forward_and_backward_is_refused() -> None:
    """The weight is saved, not its codes; autograd's own check must still see that it changed."""
    x = torch.randn(4, 12, requires_grad=True)
    layer = layer_for(x)
    y = layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# NaN and Inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_bad_row_makes_that_row_nan(bad: float, dtype: torch.dtype, bias: bool) -> None:
    x = torch.randn(2, 3, 10).to(dtype)
    layer = layer_for(x, bias=bias)
    clean = layer(x)
    x[1, 0, 7] = bad
    y = layer(x)
    expected = torch.zeros(2, 3, 13, dtype=torch.bool)
    expected[1, 0] = True
    assert torch.equal(torch.isnan(y), expected)
    assert torch.equal(y[~expected], clean[~expected])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_weight_makes_everything_nan(bad: float) -> None:
    x = torch.randn(4, 10)
    x[1] = 0
    layer = layer_for(x)
    assert torch.isfinite(layer(x)).all()
    with torch.no_grad():
        layer.weight[2, 3] = bad
    y, dx, _ = run(layer, x)
    assert torch.isnan(y).all() and torch.isnan(dx).all()


# Autocast


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_autocast(weight_dtype: torch.dtype, inside: bool, bias: bool) -> None:
    x = torch.randn(6, 50)
    layer = layer_for(x, 12, bias, weight_dtype)
    y_cast, dx_cast, dy = run(layer, x.bfloat16())
    dw_cast, db_cast = layer.weight.grad, layer.bias.grad if bias else None

    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(leaf)
        if inside:
            y.backward(dy)
    if not inside:
        y.backward(dy)
    assert y.dtype == torch.bfloat16 and torch.equal(y, y_cast)
    assert leaf.grad.dtype == torch.float32 and torch.equal(leaf.grad, dx_cast.float())
    assert layer.weight.grad.dtype == weight_dtype and torch.equal(layer.weight.grad, dw_cast)
    if bias:
        assert torch.equal(layer.bias.grad, db_cast)


def test_backward_of_a_float32_layer_inside_autocast(oracle) -> None:
    """The forward ran in float32; autocast around the backward alone must not round its products."""
    x = torch.randn(6, 50)
    layer = layer_for(x, 12, bias=True)
    y, dx, dy = run(layer, x)
    expected = layer.weight.grad
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward(dy)
    assert torch.equal(leaf.grad, dx) and torch.equal(layer.weight.grad, expected)
    assert_gradients(oracle, layer, x, leaf.grad, dy, FLOAT32)


def test_autocast_would_lose_the_integers() -> None:
    """What the layer keeps out: under autocast a product of float32 codes comes back as bf16."""
    x = torch.randn(4, 512).bfloat16()
    layer = layer_for(x, 8)
    codes_x, _ = ternary.quantize_activations(x)
    codes_w, _ = ternary.ternarize(layer.weight.detach())
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), y)
        rounded = nn.functional.linear(codes_x.float(), codes_w.float())
    assert rounded.dtype == torch.bfloat16
    assert not torch.equal(rounded.float(), ternary.matmul_codes(codes_x, codes_w))
